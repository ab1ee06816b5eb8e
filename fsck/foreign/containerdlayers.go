package foreign

import (
	"cmp"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

// ctrBlobFile is a blob that a namespace says it has.
type ctrBlobFile struct {
	object
	digest digest.Digest
	size   int64
	layer  bool // its snapshot's comparison reads it

	judging sync.Mutex
	judged  bool
	whole   bool
}

// addBlob notes a blob that a namespace has.
func (s *ctrStore) addBlob(d digest.Digest, rec ctrBlob) {
	if d.Validate() != nil {
		s.add(Finding{Kind: Record, Severity: layout.Damage, Object: "store", Path: ctrMeta, Detail: fmt.Sprintf("blob %q has no digest for a name", d)})
		return
	}
	b := s.blobs[d]
	if b == nil {
		b = &ctrBlobFile{object: object{c: s.checker, name: "blob " + d.String()}, digest: d, size: rec.size}
		s.blobs[d] = b
	}
	for label, repositories := range rec.labels {
		if registry, ok := strings.CutPrefix(label, ctrSource); ok && b.source == "" {
			repository, _, _ := strings.Cut(repositories, ",")
			b.source = fmt.Sprintf("fetch %s again from %s/%s", d, registry, repository)
		}
	}
}

// belongs notes that an image has the blob. The image's name has the
// registry's port, which the blob's label lacks.
func (b *ctrBlobFile) belongs(o *object, name string) {
	if !slices.Contains(b.images, o.images[0]) {
		b.images = append(b.images, o.images[0])
	}
	if b.source != "" {
		b.source = cmp.Or(fetch(b.digest, name), b.source)
	}
}

func (b *ctrBlobFile) path() string { return path.Join(ctrContent, blobPath(b.digest)) }

// document reads a small blob that is whole.
func (s *ctrStore) document(d ocispec.Descriptor) []byte {
	data, err := readSmall(s.files, path.Join(ctrContent, blobPath(d.Digest)))
	if err != nil || d.Digest.Algorithm().FromBytes(data) != d.Digest {
		return nil
	}
	return data
}

// open opens a blob whose file has the right size.
func (s *ctrStore) open(b *ctrBlobFile) io.ReadCloser {
	f, err := s.files.open(b.path())
	if err != nil {
		b.once(func() bool {
			b.unreadable(b.path(), err)
			return false
		})
		return nil
	}
	if size, err := s.files.stat(b.path()); err == nil && b.size >= 0 && size != b.size {
		b.once(func() bool { return !b.wrongSize(b.path(), size, b.size) })
		f.Close()
		return nil
	}
	return f
}

// once judges a blob, which several layers may be made of, and tells whether
// it is whole.
func (b *ctrBlobFile) once(judge func() bool) bool {
	b.judging.Lock()
	defer b.judging.Unlock()
	if !b.judged {
		b.judged, b.whole = true, judge()
	}
	return b.whole
}

// compare compares all trees with their blobs and all blobs with their
// digests, several at once.
func (s *ctrStore) compare() error {
	s.report.Blobs = len(s.blobs)
	kept := 0
	for _, l := range s.layers {
		if l.blob != nil {
			kept++
			l.blob.layer = true
			s.expect(max(0, s.snapshots[l.snapshot].size))
		}
	}
	if n := len(s.layers) - kept; n > 0 {
		s.add(Finding{
			Kind: Unchecked, Severity: layout.Notice, Object: "store", Path: ctrTrees,
			Detail: fmt.Sprintf("%d of %d layers are not compared: their blobs are not kept", n, len(s.layers)),
		})
	}
	g, ctx := errgroup.WithContext(s.ctx)
	g.SetLimit(s.opts.Workers)
	for _, l := range s.layers {
		g.Go(func() error {
			if ctx.Err() == nil {
				s.compareLayer(l)
			}
			return ctx.Err()
		})
	}
	for _, b := range s.blobs {
		s.expect(max(0, b.size))
		g.Go(func() error {
			if ctx.Err() == nil && !b.layer {
				s.hash(b)
			}
			return ctx.Err()
		})
	}
	return g.Wait()
}

// hash compares a blob with its digest.
func (s *ctrStore) hash(b *ctrBlobFile) {
	f := s.open(b)
	if f == nil {
		return
	}
	defer f.Close()
	sum, err := s.hashBlob(f, b.digest.Algorithm())
	if s.ctx.Err() == nil {
		b.once(func() bool { return b.judge(b.path(), b.digest, nil, layerBlob{sum: sum}, err) })
	}
}

// again says where the layer's contents can be had again.
func (l *ctrLayer) again() {
	if l.blob != nil && l.source == "" {
		l.source = "blob " + l.blob.digest.String() + " in this store has it: remove the images named here and pull them again, which unpacks it"
	}
}

// compareLayer compares a snapshot's tree with the blob that it was unpacked
// from.
func (s *ctrStore) compareLayer(l *ctrLayer) {
	rec, ok := s.snapshots[l.snapshot]
	root, err := reach.Dir(unix.AT_FDCWD, filepath.Join(s.opts.Root, rec.tree()))
	if !ok || err != nil || rec.kind != ctrCommitted {
		if l.blob != nil {
			s.hash(l.blob)
		}
		return // it has been said that it is not there, or it is being made
	}
	defer root.Close()
	if l.blob == nil {
		return
	}
	var want *node
	if f := s.open(l.blob); f != nil {
		defer f.Close()
		want = s.expected(l, f)
	}
	if s.ctx.Err() != nil {
		return
	}
	if want == nil {
		files, empty := countEmpty(root)
		l.say(Unchecked, layout.Notice, place{path: rec.tree()}, "", "its blob does not say what its %d files must be; %d of them are empty", files, empty)
		return
	}
	s.mu.Lock()
	s.report.Layers++
	s.mu.Unlock()
	l.again()
	t := &comparison{object: &l.object, folder: rec.tree(), rest: l.source, below: s.below(rec), contents: s.hashFile}
	t.run(root, want)
}

// expected reads the blob of a layer; nil: it is not whole, or no layer.
func (s *ctrStore) expected(l *ctrLayer, f io.Reader) *node {
	var want *node
	b := l.blob
	read, err := s.readLayer(f, b.digest.Algorithm(), l.diff.Algorithm(), func(stream io.Reader) (err error) {
		want, err = expect(stream, true)
		return err
	})
	if s.ctx.Err() != nil || !b.once(func() bool { return b.judge(b.path(), b.digest, []digest.Digest{l.diff}, read, err) }) || read.err != nil {
		return nil
	}
	return want
}

// hashFile is a comparison's contents.
func (s *ctrStore) hashFile(e *expected, dirfd int, base string) (string, error) {
	f, err := reach.Regular(dirfd, base)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum, err := s.hashBlob(f, digest.SHA256)
	if must := digest.NewDigestFromBytes(digest.SHA256, e.sum[:]); err == nil && sum != must {
		return fmt.Sprintf("its bytes have the digest %s, must have %s", sum, must), nil
	}
	return "", err
}

// below are the trees under a snapshot's.
func (s *ctrStore) below(rec ctrSnapshot) (out stack) {
	for up, ok := s.snapshots[rec.parent]; ok && len(out) <= len(s.snapshots); up, ok = s.snapshots[up.parent] {
		out = append(out, filepath.Join(s.opts.Root, up.tree()))
	}
	return out
}
