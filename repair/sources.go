package repair

import (
	"archive/tar"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layer"
	"varve.dev/layout"
)

// needs are the contents to be found, by their sum.
type needs map[string][]*change

func (n needs) add(c *change) { n[c.want.SHA256] = append(n[c.want.SHA256], c) }

// size tells whether anything of this size is needed.
func (n needs) size(size int64) bool {
	for _, list := range n {
		if list[0].want.Size == size {
			return true
		}
	}
	return false
}

// source may have contents that are needed. What it hands over is compared
// with its sum: a source need not be whole.
type source interface {
	fmt.Stringer
	fetch() int64 // bytes that it takes from a registry
	// each calls take with files that may be needed, until nothing is.
	each(ctx context.Context, t *treeRepair, need needs, take take) error
}

// take reads a file of which sum may be known ("" otherwise).
type take func(sum string, r io.Reader) error

// sourcesOf returns where the files of a layer can be had again, in the order
// in which they are tried.
func (w *work) sourcesOf(id layout.LayerID, rec layout.LayerRecord) (list []source) {
	blobs := w.known.blobsOf(rec)
	for _, d := range blobs {
		if _, ok := w.known.blobs[d]; ok {
			list = append(list, blobSource(d))
		}
	}
	list = append(list, otherLayers(id))
	for _, d := range blobs {
		if w.registries != nil && len(w.known.repositories(d)) > 0 {
			list = append(list, registrySource{blob: d, size: w.known.descriptor(d).Size})
		}
	}
	return list
}

// find makes the files whose contents are needed, from the first source that
// has them, and notes them in made.
func (t *treeRepair) find(ctx context.Context, need needs, made map[*change]string) error {
	for _, s := range t.sources {
		if len(need) == 0 {
			return nil
		}
		before := len(need)
		err := s.each(ctx, t, need, func(sum string, r io.Reader) error { return t.makeFrom(sum, r, need, made) })
		if err := ctx.Err(); err != nil {
			return err
		}
		if err != nil && !errors.Is(err, errFound) {
			t.out.Error = fmt.Sprintf("%s: %v", s, err) // the next source may do
		}
		if len(need) < before {
			t.out.From = s.String()
		}
	}
	if len(need) == 0 {
		t.out.Error = ""
	}
	return nil
}

// errFound ends a source's reading: nothing more is needed.
var errFound = errors.New("everything is found")

// makeFrom makes a file from r for every entry that needs its contents.
func (t *treeRepair) makeFrom(sum string, r io.Reader, need needs, made map[*change]string) error {
	if sum != "" && need[sum] == nil {
		return nil
	}
	hash := layout.Algorithm.Hash()
	list := slices.Concat(slices.Collect(maps.Values(need))...)
	if sum != "" {
		list = need[sum]
	}
	first := t.place.name(path.Join(t.tree(), list[0].want.Names[0]))
	if _, _, err := t.good.File(first, attrOf(list[0].want), io.TeeReader(r, hash), false, make([]byte, 128<<10)); err != nil {
		return err
	}
	got := hex.EncodeToString(hash.Sum(nil))
	// The first one may have been made with another's attributes.
	for _, c := range need[got] {
		at, err := t.copyOf(first, c)
		if err != nil {
			return err
		}
		made[c] = at
	}
	delete(need, got)
	if err := t.good.Remove(first); err != nil {
		return err
	}
	delete(t.place.note.Files, first)
	if len(need) == 0 {
		return errFound
	}
	return nil
}

// copyOf makes the file of an entry from another one in the place. Blocks are
// not shared: those of the original may be what is bad.
func (t *treeRepair) copyOf(first string, c *change) (at string, err error) {
	f, err := os.Open(t.Root.Path(path.Join(t.place.rel, first)))
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	defer f.Close()
	at = t.place.name(path.Join(t.tree(), c.want.Names[0]))
	_, _, err = t.good.File(at, attrOf(c.want), struct{ io.Reader }{f}, false, make([]byte, 128<<10))
	return at, err
}

// blobSource is a layer's blob in the store.
type blobSource layout.BlobDigest

func (s blobSource) String() string { return "blob " + string(s) }
func (s blobSource) fetch() int64   { return 0 }

func (s blobSource) each(ctx context.Context, t *treeRepair, need needs, take take) error {
	r, err := t.Blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: layout.BlobDigest(s).Digest()})
	if err != nil {
		return err
	}
	defer r.Close()
	stream, _, err := layer.Decompress(io.NewSectionReader(r, 0, r.Size()))
	if err != nil {
		return err
	}
	defer stream.Close()
	archive := tar.NewReader(stream)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		hdr, err := archive.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if hdr.Typeflag != tar.TypeReg && hdr.Typeflag != tar.TypeGNUSparse || !need.size(hdr.Size) {
			continue
		}
		if err := take("", archive); err != nil {
			return err
		}
	}
}

// otherLayers are the trees of the store, the damaged one's other files
// included.
type otherLayers layout.LayerID

func (otherLayers) String() string { return "other files of the store with the same content" }
func (otherLayers) fetch() int64   { return 0 }

func (otherLayers) each(ctx context.Context, t *treeRepair, need needs, take take) error {
	for id, rec := range t.known.layers {
		other := &treeRepair{work: t.work, id: id, rec: rec}
		files, err := other.manifest(ctx)
		if err != nil {
			continue // that layer's own repair says so
		}
		for i := range files.Entries {
			e := &files.Entries[i]
			if e.SHA256 == "" || need[e.SHA256] == nil {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			f, err := t.Root.OpenBelow(other.tree(), e.Names[0])
			if err != nil {
				continue
			}
			err = take(e.SHA256, f)
			f.Close()
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// registrySource is a layer's blob as a registry has it. It goes into the
// store.
type registrySource struct {
	blob layout.BlobDigest
	size int64
}

func (s registrySource) String() string { return "blob " + string(s.blob) + " of its registry" }
func (s registrySource) fetch() int64   { return s.size }

func (s registrySource) each(ctx context.Context, t *treeRepair, need needs, take take) error {
	fetched, err := t.fetchBlob(ctx, s.blob)
	t.out.Fetched += fetched
	if err != nil {
		return err
	}
	return blobSource(s.blob).each(ctx, t, need, take)
}
