package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/content"
	"varve.dev/errdefs"
	"varve.dev/layer"
	"varve.dev/layout"
)

// LoadOptions may be left zero.
type LoadOptions struct {
	// Name is given to an image that the archive has no name for; an archive
	// with several such images is refused.
	Name     string
	Progress Progress
}

// Loaded is one image of an archive.
type Loaded struct {
	Name   string
	Target ocispec.Descriptor
}

// Load brings the images of a tar stream, compressed or not, into the store:
// an OCI image layout, or what docker save wrote, of any age. It reads the
// stream once and needs no copy of it. All images become visible together.
//
// Errors: ErrInvalidArgument for a stream that is none of these, and for an
// image without a name; ErrFailedPrecondition for bytes that do not fit their
// digest; ErrNotFound for a blob that the archive names and neither it nor the
// store has.
func (s *Store) Load(ctx context.Context, stream io.Reader, options LoadOptions) ([]Loaded, error) {
	plain, _, err := layer.Decompress(stream)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	defer plain.Close()
	return s.load(ctx, options, func(l *loader) error { return l.readTar(ctx, tar.NewReader(plain)) })
}

// LoadDir is Load for an OCI image layout, or an unpacked docker archive, in a
// folder.
func (s *Store) LoadDir(ctx context.Context, dir string, options LoadOptions) ([]Loaded, error) {
	return s.load(ctx, options, func(l *loader) error { return l.readDir(ctx, dir) })
}

func (s *Store) load(ctx context.Context, options LoadOptions, read func(*loader) error) ([]Loaded, error) {
	a, err := s.assemble(ctx, "load", "", nil)
	if err != nil {
		return nil, err
	}
	// Its ingests are its own: it takes no turns, since it cannot know the
	// digests before it has read the stream.
	a.once = true
	l := &loader{a: a, options: options, small: map[string][]byte{}, blobs: map[string]ocispec.Descriptor{}, links: map[string]string{}}
	if err := read(l); err != nil {
		return nil, a.abandon(err)
	}
	found, err := l.images(ctx)
	if err != nil {
		return nil, a.abandon(err)
	}
	makes, edges, err := l.unpack(ctx, found)
	if err != nil {
		return nil, a.abandon(err)
	}
	return found, a.publish(ctx, makes, edges)
}

// loader reads an archive. Documents may come before or after the blobs they
// name, so it first takes in everything and then looks at what it is.
type loader struct {
	a       *assembly
	options LoadOptions

	small map[string][]byte             // documents by name
	total int                           // bytes in small
	blobs map[string]ocispec.Descriptor // by name in the archive; media type not known
	links map[string]string             // symbolic links of old docker archives
}

// maxDocuments bounds what an archive's documents take in memory together.
const maxDocuments = 64 << 20

func (l *loader) readTar(ctx context.Context, tr *tar.Reader) error {
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			if kindOf(err) == nil {
				return err
			}
			return fmt.Errorf("no archive of images: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		name := path.Clean(strings.TrimPrefix(h.Name, "/"))
		switch h.Typeflag {
		case tar.TypeReg:
			err = l.file(ctx, name, h.Size, tr)
		case tar.TypeSymlink:
			l.links[name] = path.Join(path.Dir(name), h.Linkname)
		case tar.TypeLink:
			l.links[name] = path.Clean(h.Linkname)
		}
		if err != nil {
			return err
		}
	}
}

func (l *loader) readDir(ctx context.Context, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("image layout %s: %w: %w", dir, err, errdefs.ErrNotFound)
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		f, err := root.Open(filepath.FromSlash(name)) // follows links, inside dir only
		if err != nil {
			return fmt.Errorf("image layout %s: %w: %w", dir, err, errdefs.ErrInvalidArgument)
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil || !info.Mode().IsRegular() {
			return err
		}
		return l.file(ctx, name, info.Size(), f)
	})
}

// file takes in one file: a blob under its digest, an old layer, a document.
func (l *loader) file(ctx context.Context, name string, size int64, data io.Reader) error {
	dir, base := path.Split(name)
	if dir == ocispec.ImageBlobsDir+"/"+layout.Algorithm.String()+"/" {
		d, err := layout.ParseBlobDigest(layout.Algorithm.String() + ":" + base)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return l.blob(ctx, name, d, data)
	}
	if strings.HasSuffix(base, ".tar") {
		return l.blob(ctx, name, "", data)
	}
	if path.Ext(base) != ".json" && base != ocispec.ImageLayoutFile {
		return nil // "VERSION", "repositories" and the like say nothing new
	}
	if size > maxConfig || l.total+int(size) > maxDocuments {
		return fmt.Errorf("%s has %d bytes, too much for a document: %w", name, size, errdefs.ErrResourceExhausted)
	}
	l.total += int(size)
	content, err := io.ReadAll(io.LimitReader(data, size))
	l.small[name] = content
	return err
}

// blob takes in a file whose digest is expected, or found out if that is "".
func (l *loader) blob(ctx context.Context, name string, expected layout.BlobDigest, data io.Reader) error {
	in, err := l.a.store.blobs.NewIngest()
	if err != nil {
		return err
	}
	if _, err := io.Copy(in, contextReader{ctx, data}); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", name, err), in.Discard())
	}
	if err := in.Verify(0, expected); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", name, err), in.Discard())
	}
	d := in.Digest().Digest()
	l.blobs[name] = ocispec.Descriptor{Digest: d, Size: in.Size()}
	return l.keep(ctx, d, in)
}

// keep adds a whole ingest, or throws it away when the store has the blob.
func (l *loader) keep(ctx context.Context, d digest.Digest, in *content.Ingest) error {
	if l.a.has(d) {
		return in.Discard()
	}
	if err := l.a.hold(ctx, []digest.Digest{d}); err != nil {
		return errors.Join(err, in.Discard())
	}
	if l.a.found[d] {
		return in.Discard()
	}
	l.a.add(d, in)
	return nil
}

// resolve follows the links of an archive to a blob.
func (l *loader) resolve(name string) (ocispec.Descriptor, bool) {
	name = path.Clean(name)
	for range 10 {
		if desc, ok := l.blobs[name]; ok {
			return desc, true
		}
		next, ok := l.links[name]
		if !ok {
			break
		}
		name = next
	}
	return ocispec.Descriptor{}, false
}

// read is a blobReader on the archive and the store.
func (l *loader) read(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	r, done, err := l.a.reader(ctx, desc)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil, fmt.Errorf("blob %s (%s) is neither in the archive nor in the store: %w", desc.Digest, desc.MediaType, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = done() }() // it was only read
	return io.ReadAll(io.LimitReader(r, limit+1))
}

// images finds out what the archive holds. Where it is both kinds, as docker
// writes since 25, the OCI layout says more.
func (l *loader) images(ctx context.Context) ([]Loaded, error) {
	if data, ok := l.small[ocispec.ImageIndexFile]; ok {
		return l.ociImages(data)
	}
	if data, ok := l.small[dockerManifestFile]; ok {
		return l.dockerImages(ctx, data)
	}
	return nil, fmt.Errorf("the archive has neither index.json nor manifest.json, it holds no images: %w", errdefs.ErrInvalidArgument)
}

func (l *loader) ociImages(data []byte) (out []Loaded, err error) {
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, fmt.Errorf("index.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	for _, desc := range index.Manifests {
		if err := checkDescriptor("index.json", desc); err != nil {
			return nil, err
		}
		name, err := l.nameFor(desc.Digest, nameIn(desc.Annotations))
		if err != nil {
			return nil, err
		}
		desc.Annotations = nil
		out = append(out, Loaded{name, desc})
	}
	return out, nil
}

// nameIn takes the full name that containerd and docker write, or a reference
// that is more than a tag: the specification leaves open what it holds.
func nameIn(annotations map[string]string) string {
	if name := annotations[annotationImageName]; name != "" {
		return name
	}
	if name := annotations[ocispec.AnnotationRefName]; strings.ContainsAny(name, ":/") {
		return name
	}
	return ""
}

func (l *loader) nameFor(d digest.Digest, name string) (string, error) {
	if name == "" {
		// Used once: the second image without a name has none.
		name, l.options.Name = l.options.Name, ""
	}
	if name == "" {
		return "", fmt.Errorf("the image %s of the archive has no name, one has to be given: %w", d, errdefs.ErrInvalidArgument)
	}
	ref, err := ParseRef(name)
	if err != nil {
		return "", err
	}
	return ref.String(), nil
}

// unpack unpacks each image for this machine, or for what there is, and
// returns the names and references to record.
func (l *loader) unpack(ctx context.Context, found []Loaded) (makes []layout.ImageMake, edges []layout.Edge, err error) {
	now := time.Now().UTC()
	unpacked := map[digest.Digest]bool{}
	for _, img := range found {
		makes = append(makes, layout.ImageMake{Name: img.Name, Record: layout.ImageRecord{Target: img.Target, Created: now, Updated: now}})
		all, err := l.present(ctx, img.Target, 0)
		if err != nil {
			return nil, nil, fmt.Errorf("image %s: %w", img.Name, err)
		}
		best := all[0]
		for _, p := range all {
			edges = append(edges, p.edges(l.a.has)...)
			if !hostPlatform().Match(best.image.Platform) && hostPlatform().Match(p.image.Platform) {
				best = p
			}
		}
		if unpacked[best.manifest.Digest] {
			continue
		}
		unpacked[best.manifest.Digest] = true
		if err := l.a.layers(ctx, best, absent, defaultParallel, l.options.Progress); err != nil {
			return nil, nil, fmt.Errorf("image %s: %w", img.Name, err)
		}
	}
	return makes, edges, nil
}

// absent is the source of a layer that can be had nowhere else.
func absent(_ context.Context, desc ocispec.Descriptor, _ int64) io.ReadCloser {
	return io.NopCloser(failing{fmt.Errorf("blob %s is missing: %w", desc.Digest, errdefs.ErrNotFound)})
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// present returns every image below target whose manifest is in the archive
// or the store, at least one.
func (l *loader) present(ctx context.Context, target ocispec.Descriptor, depth int) ([]*picked, error) {
	if !images.IsIndexType(target.MediaType) || depth >= maxNesting {
		p, err := pick(ctx, l.read, target, hostPlatform())
		return []*picked{p}, err
	}
	var index ocispec.Index
	if err := readJSON(ctx, l.read, target, maxManifest, &index); err != nil {
		return nil, err
	}
	var all []*picked
	for _, child := range index.Manifests {
		if !l.here(ctx, child.Digest) {
			continue
		}
		below, err := l.present(ctx, child, depth+1)
		if err != nil {
			return nil, err
		}
		for _, p := range below {
			p.indexes = append([]ocispec.Descriptor{target}, p.indexes...)
		}
		all = append(all, below...)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("index %s: no manifest of it is in the archive or the store: %w", target.Digest, errdefs.ErrNotFound)
	}
	return all, nil
}

// here tells whether a blob is in the archive or the store, and holds it.
func (l *loader) here(ctx context.Context, d digest.Digest) bool {
	return l.a.has(d) || (l.a.hold(ctx, []digest.Digest{d}) == nil && l.a.found[d])
}

type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}
