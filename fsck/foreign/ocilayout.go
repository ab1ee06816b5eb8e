package foreign

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// dockerManifest is docker's list of the images in an archive.
const dockerManifest = "manifest.json"

// ociLayout is an OCI image layout (OCI image-spec, image-layout.md), with
// docker's manifest.json if there is one.
type ociLayout struct {
	*checker
	files folder
	blobs map[string]*layoutBlob // by path
}

// layoutBlob is a file that something names.
type layoutBlob struct {
	object
	path   string
	digest digest.Digest   // empty: nothing says
	size   int64           // negative: nothing says
	diffs  []digest.Digest // what its stream must be
}

// layout checks a layout.
func (c *checker) layout() error {
	l := &ociLayout{checker: c, blobs: map[string]*layoutBlob{}}
	var err error
	if fi, serr := os.Stat(c.opts.Root); serr == nil && !fi.IsDir() {
		l.files, err = openArchive(c.opts.Root)
	} else {
		l.files, err = openDirectory(c.opts.Root)
	}
	if err != nil {
		return err
	}
	defer l.files.close()
	index, ierr := readSmall(l.files, ocispec.ImageIndexFile)
	images, derr := readSmall(l.files, dockerManifest)
	if _, err := l.files.stat(ocispec.ImageLayoutFile); err != nil && errors.Is(ierr, fs.ErrNotExist) {
		return fmt.Errorf("no OCI layout is there, neither %s nor %s: %w", ocispec.ImageIndexFile, ocispec.ImageLayoutFile, errdefs.ErrNotFound)
	}
	l.mark()
	whole := l.index(index, ierr)
	if !errors.Is(derr, fs.ErrNotExist) {
		l.dockerImages(images, derr)
	}
	if whole {
		l.others()
	}
	return l.verify()
}

// mark checks oci-layout.
func (l *ociLayout) mark() {
	data, err := readSmall(l.files, ocispec.ImageLayoutFile)
	var mark ocispec.ImageLayout
	if err == nil {
		err = json.Unmarshal(data, &mark)
	}
	if err == nil && mark.Version != ocispec.ImageLayoutVersion {
		err = fmt.Errorf("version %q, not %q", mark.Version, ocispec.ImageLayoutVersion)
	}
	if err != nil {
		self := object{c: l.checker, name: "store", source: fmt.Sprintf(`write {"imageLayoutVersion":"%s"}`, ocispec.ImageLayoutVersion)}
		self.unreadable(ocispec.ImageLayoutFile, err)
	}
}

// index follows index.json. It tells whether all could be read that names
// blobs.
func (l *ociLayout) index(data []byte, err error) bool {
	var index ocispec.Index
	if err == nil {
		err = json.Unmarshal(data, &index)
	}
	if err != nil {
		self := object{c: l.checker, name: "store"}
		self.unreadable(ocispec.ImageIndexFile, err)
		return false
	}
	g := &graph{document: l.document, held: l.holds, reach: l.reach, absent: absent}
	for _, d := range index.Manifests {
		l.report.Images++
		o := l.image(cmp.Or(d.Annotations["io.containerd.image.name"], d.Annotations[ocispec.AnnotationRefName], d.Digest.String()))
		if err := d.Digest.Validate(); err != nil {
			o.found(Record, place{path: ocispec.ImageIndexFile}, "digest %q: %v", d.Digest, err)
			continue
		}
		g.manifests(o, d)
	}
	return !g.blind
}

func (l *ociLayout) image(name string) *object {
	return &object{c: l.checker, name: "image " + name, images: []string{name}}
}

func (l *ociLayout) holds(d ocispec.Descriptor) bool {
	_, err := l.files.stat(blobPath(d.Digest))
	return !errors.Is(err, fs.ErrNotExist)
}

// absent says that a platform is not in the layout. Whoever copies one
// platform of an image may leave the index as it is.
func absent(o *object, index digest.Digest, child ocispec.Descriptor) {
	o.say(Missing, layout.Notice, place{path: blobPath(child.Digest)}, "", "index %s names this manifest, which may never have been here", index)
}

// document reads a small blob that is whole.
func (l *ociLayout) document(d ocispec.Descriptor) []byte {
	data, err := readSmall(l.files, blobPath(d.Digest))
	if err != nil || d.Digest.Algorithm().FromBytes(data) != d.Digest {
		return nil
	}
	return data
}

// reach notes that an image has a blob.
func (l *ociLayout) reach(o *object, d ocispec.Descriptor, diff digest.Digest) {
	b := l.file(o, blobPath(d.Digest), d.Digest, diff)
	if b.size >= 0 && b.size != d.Size {
		o.found(Record, place{path: b.path}, "it is named with %d bytes and with %d", b.size, d.Size)
	}
	b.size = d.Size
}

// file notes that an image has a file.
func (l *ociLayout) file(o *object, at string, d, diff digest.Digest) *layoutBlob {
	b := l.blobs[at]
	if b == nil {
		b = &layoutBlob{object: object{c: l.checker, name: "blob " + cmp.Or(d.String(), at)}, path: at, digest: d, size: -1}
		l.blobs[at] = b
	}
	for _, name := range o.images {
		if !slices.Contains(b.images, name) {
			b.images = append(b.images, name)
		}
		b.source = cmp.Or(b.source, fetch(d, name))
	}
	if diff != "" && !slices.Contains(b.diffs, diff) {
		b.diffs = append(b.diffs, diff)
	}
	return b
}

// verify compares every file that is named, several at once.
func (l *ociLayout) verify() error {
	for _, b := range l.blobs {
		l.expect(max(0, b.size))
		if len(b.diffs) > 0 {
			l.report.Layers++
		}
	}
	l.report.Blobs = len(l.blobs)
	g, ctx := errgroup.WithContext(l.ctx)
	g.SetLimit(l.opts.Workers)
	for _, at := range slices.Sorted(maps.Keys(l.blobs)) {
		g.Go(func() error {
			if ctx.Err() == nil {
				l.verifyBlob(l.blobs[at])
			}
			return ctx.Err()
		})
	}
	return g.Wait()
}

func (l *ociLayout) verifyBlob(b *layoutBlob) {
	f, err := l.files.open(b.path)
	if err != nil {
		b.unreadable(b.path, err)
		return
	}
	defer f.Close()
	if size, err := l.files.stat(b.path); err == nil && b.size >= 0 && b.wrongSize(b.path, size, b.size) {
		return
	}
	must := cmp.Or(b.digest.Algorithm(), digest.Canonical)
	var read layerBlob
	if len(b.diffs) > 0 {
		read, err = l.readLayer(f, must, b.diffs[0].Algorithm(), ignored)
	} else {
		read.sum, err = l.hashBlob(f, must)
	}
	b.judge(b.path, b.digest, b.diffs, read, err)
}

// others reports blobs that nothing names.
func (l *ociLayout) others() {
	algorithms, _ := l.files.list(ocispec.ImageBlobsDir)
	for _, a := range algorithms {
		names, _ := l.files.list(path.Join(ocispec.ImageBlobsDir, a))
		for _, name := range names {
			if at := path.Join(ocispec.ImageBlobsDir, a, name); l.blobs[at] == nil {
				l.unnamed(at, "a blob")
			}
		}
	}
}

// dockerImages checks manifest.json, which names files by path.
func (l *ociLayout) dockerImages(data []byte, err error) {
	var images []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err == nil {
		err = json.Unmarshal(data, &images)
	}
	if err != nil {
		self := object{c: l.checker, name: "store", source: "index.json has the same images"}
		self.unreadable(dockerManifest, err)
		return
	}
	for _, i := range images {
		o := l.image(cmp.Or(strings.Join(i.RepoTags, ", "), i.Config))
		o.images = i.RepoTags
		l.file(o, i.Config, digestOf(i.Config), "")
		config, err := readSmall(l.files, i.Config)
		var diffs []digest.Digest
		if err == nil && digestOf(i.Config).Validate() == nil && digest.FromBytes(config) == digestOf(i.Config) {
			if diffs, err = diffsOf(config, len(i.Layers)); err != nil {
				o.found(Record, place{path: dockerManifest}, "%s: %v", i.Config, err)
			}
		}
		for n, layer := range i.Layers {
			diff := digest.Digest("")
			if diffs != nil {
				diff = diffs[n]
			}
			l.file(o, layer, digestOf(layer), diff)
		}
	}
}

// digestOf is the digest that a path in docker's list has in it; empty: none.
func digestOf(name string) digest.Digest {
	d := digest.NewDigestFromEncoded(digest.SHA256, strings.TrimSuffix(path.Base(name), ".json"))
	if d.Validate() != nil {
		return ""
	}
	return d
}
