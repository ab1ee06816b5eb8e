package foreign

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"golang.org/x/sys/unix"

	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

// maxDocument is more than any manifest or config has.
const maxDocument = 16 << 20

// dockerConfig is docker's name for the media type of a config.
const dockerConfig = "application/vnd.docker.container.image.v1+json"

// maxIndexes is how deep indexes lie in each other.
const maxIndexes = 8

// graph reads what hangs together below the images of a store: indexes,
// manifests, configs and layers.
type graph struct {
	// document reads a blob that is whole, or nothing; what is wrong with it
	// is for the check of blobs to say.
	document func(ocispec.Descriptor) []byte
	// held tells whether the store says that it has a manifest of an index.
	held func(ocispec.Descriptor) bool
	// reach is told of every blob that the image o has, with its DiffID if it
	// is a layer and that is known.
	reach func(o *object, d ocispec.Descriptor, diff digest.Digest)
	// absent is told of the manifests of an index that are not held.
	absent func(o *object, index digest.Digest, child ocispec.Descriptor)
	// folder is where blobs stand.
	folder string
	// blind says that something could not be read: what nothing else names
	// may be what that does.
	blind bool
}

// manifest is an image for one platform, or something about an image.
type manifest struct {
	config ocispec.Descriptor
	layers []ocispec.Descriptor
	// diffs are the DiffIDs of its layers; nil: its config cannot be read, or
	// is no image's.
	diffs []digest.Digest
	// about says that it is about an image, such as a signature.
	about bool
}

// manifests are what an image is made of.
func (g *graph) manifests(o *object, target ocispec.Descriptor) []manifest {
	return g.below(o, target, 0)
}

func (g *graph) below(o *object, d ocispec.Descriptor, depth int) (out []manifest) {
	g.reach(o, d, "")
	data := g.document(d)
	if data == nil {
		g.blind = true
		return nil
	}
	m, err := decode(data)
	if err == nil && depth > maxIndexes {
		err = errors.New("it lies too deep")
	}
	if err != nil {
		g.blind = true
		o.found(Record, place{path: path.Join(g.folder, blobPath(d.Digest))}, "%v", err)
		return nil
	}
	for _, child := range m.Manifests {
		if g.held(child) {
			out = append(out, g.below(o, child, depth+1)...)
		} else {
			g.blind = true
			g.absent(o, d.Digest, child)
		}
	}
	if m.Config.Digest == "" {
		return out
	}
	return append(out, g.manifest(o, manifest{config: m.Config, layers: m.Layers, about: d.Platform != nil && d.Platform.OS == "unknown"}))
}

// document is an index or a manifest, or both.
type document struct {
	Config    ocispec.Descriptor   `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	Manifests []ocispec.Descriptor `json:"manifests"`
}

func decode(data []byte) (d document, err error) {
	err = json.Unmarshal(data, &d)
	for _, child := range slices.Concat(d.Manifests, d.Layers) {
		err = errors.Join(err, child.Digest.Validate())
	}
	if d.Config.Digest != "" {
		err = errors.Join(err, d.Config.Digest.Validate())
	}
	return d, err
}

func (g *graph) manifest(o *object, m manifest) manifest {
	g.reach(o, m.config, "")
	if m.config.MediaType == ocispec.MediaTypeImageConfig || m.config.MediaType == dockerConfig {
		if data := g.document(m.config); data != nil {
			var err error
			if m.diffs, err = diffsOf(data, len(m.layers)); err != nil {
				o.found(Record, place{path: path.Join(g.folder, blobPath(m.config.Digest))}, "%v", err)
			}
		}
	}
	for i, layer := range m.layers {
		diff := digest.Digest("")
		if m.diffs != nil && !strings.Contains(layer.MediaType, "+encrypted") {
			diff = m.diffs[i]
		}
		g.reach(o, layer, diff)
	}
	return m
}

// diffsOf reads the DiffIDs of so many layers from a config.
func diffsOf(config []byte, layers int) ([]digest.Digest, error) {
	var c ocispec.Image
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, err
	}
	if len(c.RootFS.DiffIDs) != layers {
		return nil, fmt.Errorf("it has %d DiffIDs for %d layers", len(c.RootFS.DiffIDs), layers)
	}
	for _, d := range c.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return nil, fmt.Errorf("DiffID %q: %w", d, err)
		}
	}
	return c.RootFS.DiffIDs, nil
}

// blobPath is where layouts and containerd keep a blob, below their folder.
func blobPath(d digest.Digest) string {
	return path.Join("blobs", d.Algorithm().String(), d.Encoded())
}

// fetch is the repair of a blob of an image whose name says where it came
// from; empty: it does not.
func fetch(d digest.Digest, name string) string {
	ref, err := reference.ParseNamed(name)
	if err != nil || !strings.ContainsAny(reference.Domain(ref), ".:") {
		return ""
	}
	return fmt.Sprintf("fetch %s again from %s", d, ref.Name())
}

// sizeKind is what is wrong with a file that has not the size that it must
// have.
func sizeKind(have, must int64) (kind Kind, detail string) {
	switch {
	case have == must:
		return "", ""
	case have == 0:
		kind = Empty
	case have < must:
		kind = Short
	default:
		kind = Long
	}
	return kind, fmt.Sprintf("%d bytes, must be %d", have, must)
}

// wrongSize reports a file that has not the size that it must have.
func (o *object) wrongSize(path string, have, must int64) bool {
	kind, detail := sizeKind(have, must)
	if kind != "" {
		o.found(kind, place{path: path}, "%s", detail)
	}
	return kind != ""
}

// judge reports what reading a blob showed. It tells whether that is all as it
// must be. No digest: nothing says what the bytes must be.
func (o *object) judge(path string, must digest.Digest, diffs []digest.Digest, read layerBlob, err error) bool {
	at := place{path: path}
	switch {
	case err != nil:
		o.found(Altered, at, "%v", err)
		return false
	case must != "" && read.sum != must:
		o.found(Altered, at, "the bytes have the digest %s", read.sum)
		return false
	}
	for _, diff := range diffs {
		switch {
		case read.diff == diff:
		case read.err != nil:
			o.found(Record, at, "the bytes are those of its digest, but it is no layer with the DiffID %s: %v", diff, read.err)
			return false
		default:
			o.found(Record, at, "the bytes are those of its digest, but its stream is %s, and the config says %s", read.diff, diff)
			return false
		}
	}
	return true
}

// unreadable reports a file that should be read and cannot be.
func (o *object) unreadable(path string, err error) {
	kind, detail := Record, err.Error()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		kind, detail = Missing, "it is not there"
	case errors.Is(err, reach.ErrNotRegular), errors.Is(err, unix.ENOTDIR):
		kind = Type
	case errors.Is(err, errEmpty):
		kind, detail = Empty, errEmpty.Error()
	}
	o.found(kind, place{path: path}, "%s", detail)
}

// unnamedTree is unnamed for a tree, of which it says what can be seen.
func (c *checker) unnamedTree(at, files string) {
	what := "a tree"
	if d, err := reach.Dir(unix.AT_FDCWD, filepath.Join(c.opts.Root, at, files)); err == nil {
		n, empty := countEmpty(d)
		what = fmt.Sprintf("a tree of %d files, %d of them empty,", n, empty)
		d.Close()
	}
	c.unnamed(at, what)
}

// unnamed reports what no record names. Engines clean up later, or when they
// are started: it is no damage.
func (c *checker) unnamed(path, what string) {
	c.add(Finding{Kind: Extra, Severity: layout.Notice, Object: "store", Path: path, Detail: what + " that nothing names"})
}
