package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
)

// Names of files in archives, beside those of the OCI image layout.
const (
	dockerManifestFile = "manifest.json" // moby image/tarexport
	// annotationImageName holds the full name in an index.json, as written by
	// containerd and by docker since 25.
	annotationImageName = "io.containerd.image.name"
)

// dockerManifestItem is one image of a docker archive's manifest.json.
type dockerManifestItem struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// sink is where a saved image goes: a tar stream or a folder.
type sink interface {
	put(name string, size int64, data io.Reader) error
}

// Save writes images as one tar stream that is both an OCI image layout and a
// docker archive: index.json and manifest.json name the same blobs. Layers
// stay compressed as they are.
//
// Errors: ErrNotFound for an image, or for a layer blob that was given up
// after it was unpacked.
func (s *Store) Save(ctx context.Context, w io.Writer, what ...string) error {
	tw := tar.NewWriter(w)
	if err := s.save(ctx, &tarSink{w: tw, dirs: map[string]bool{}}, what); err != nil {
		return err
	}
	if err := tw.Close(); err != nil {
		return fmt.Errorf("save: %w: %w", err, errdefs.ErrUnavailable)
	}
	return nil
}

// SaveDir writes images as an OCI image layout into the folder dir, which is
// the caller's.
func (s *Store) SaveDir(ctx context.Context, dir string, what ...string) error {
	return s.save(ctx, dirSink(dir), what)
}

func (s *Store) save(ctx context.Context, to sink, what []string) error {
	out := saving{store: s, docs: newDocuments(s, nil), to: to, written: map[string]bool{}}
	for _, w := range what {
		if err := out.image(ctx, w); err != nil {
			return fmt.Errorf("save %s: %w", w, err)
		}
	}
	return out.finish()
}

type saving struct {
	store   *Store
	docs    *documents
	to      sink
	written map[string]bool
	index   []ocispec.Descriptor
	docker  []dockerManifestItem
}

func (o *saving) image(ctx context.Context, what string) error {
	found, err := o.store.Find(ctx, what)
	if err != nil {
		return err
	}
	target, err := o.store.whole(ctx, o.docs, found.Target)
	if err != nil {
		return err
	}
	if err := o.tree(ctx, target); err != nil {
		return err
	}
	p, err := o.store.localPick(ctx, target)
	if err != nil {
		return err
	}
	names := found.Names
	if found.Asked != "" {
		names = []string{found.Asked}
	}
	item := dockerManifestItem{Config: blobFile(p.config)}
	for _, l := range p.layers {
		item.Layers = append(item.Layers, blobFile(l))
	}
	for _, name := range names {
		ref, err := ParseRef(name)
		if err != nil {
			return err
		}
		entry := target
		entry.Annotations = map[string]string{annotationImageName: name}
		if tag := ref.Tag(); tag != "" {
			entry.Annotations[ocispec.AnnotationRefName] = tag
			item.RepoTags = append(item.RepoTags, ref.Familiar())
		}
		o.index = append(o.index, entry)
	}
	o.docker = append(o.docker, item)
	return nil
}

// tree writes desc and everything below it.
func (o *saving) tree(ctx context.Context, desc ocispec.Descriptor) error {
	var doc struct {
		Config    *ocispec.Descriptor
		Layers    []ocispec.Descriptor
		Manifests []ocispec.Descriptor
	}
	if err := readJSON(ctx, o.docs.read, desc, maxManifest, &doc); err != nil {
		return err
	}
	for _, child := range doc.Manifests {
		if err := o.tree(ctx, child); err != nil {
			return err
		}
	}
	blobs := append(slices.Clone(doc.Layers), desc)
	if doc.Config != nil {
		blobs = append(blobs, *doc.Config)
	}
	for _, b := range blobs {
		if err := o.blob(ctx, b); err != nil {
			return err
		}
	}
	return nil
}

func (o *saving) blob(ctx context.Context, desc ocispec.Descriptor) error {
	name := blobFile(desc)
	if o.written[name] {
		return nil
	}
	o.written[name] = true
	// What is damaged does not leave the store.
	if err := o.store.blobs.Verify(ctx, desc.Digest); err != nil {
		return err
	}
	r, err := o.store.blobs.ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer r.Close()
	return o.to.put(name, r.Size(), io.NewSectionReader(r, 0, r.Size()))
}

func (o *saving) finish() error {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: o.index}
	for _, f := range []struct {
		name string
		v    any
	}{
		{ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}},
		{ocispec.ImageIndexFile, index},
		{dockerManifestFile, o.docker},
	} {
		data, err := json.Marshal(f.v)
		if err != nil {
			return fmt.Errorf("%s: %w: %w", f.name, err, errdefs.ErrInternal)
		}
		if err := o.to.put(f.name, int64(len(data)), strings.NewReader(string(data))); err != nil {
			return err
		}
	}
	return nil
}

// blobFile is where an image layout keeps a blob.
func blobFile(desc ocispec.Descriptor) string {
	return ocispec.ImageBlobsDir + "/" + desc.Digest.Algorithm().String() + "/" + desc.Digest.Encoded()
}

type tarSink struct {
	w    *tar.Writer
	dirs map[string]bool
}

// put writes one file with a fixed time, so that the same images make the
// same archive.
func (t *tarSink) put(name string, size int64, data io.Reader) error {
	for i, c := range name {
		if dir := name[:i]; c == '/' && !t.dirs[dir] {
			t.dirs[dir] = true
			if err := t.w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: time.Unix(0, 0)}); err != nil {
				return sinkError(name, err)
			}
		}
	}
	if err := t.w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o444, Size: size, ModTime: time.Unix(0, 0)}); err != nil {
		return sinkError(name, err)
	}
	_, err := io.Copy(t.w, data)
	return sinkError(name, err)
}

type dirSink string

func (d dirSink) put(name string, _ int64, data io.Reader) error {
	path := filepath.Join(string(d), name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return sinkError(name, err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return sinkError(name, err)
	}
	defer f.Close()
	if _, err := io.Copy(f, data); err != nil {
		return sinkError(name, err)
	}
	return sinkError(name, f.Close())
}

func sinkError(name string, err error) error {
	if err == nil || kindOf(err) == nil {
		return err
	}
	return fmt.Errorf("write %s: %w: %w", name, err, errdefs.ErrUnavailable)
}
