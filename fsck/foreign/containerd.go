package foreign

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Where a containerd of any version since 1.0 keeps what.
const (
	ctrMeta      = "io.containerd.metadata.v1.bolt/meta.db"
	ctrContent   = "io.containerd.content.v1.content"
	ctrSnapshots = "io.containerd.snapshotter.v1.overlayfs/metadata.db"
	ctrTrees     = "io.containerd.snapshotter.v1.overlayfs/snapshots"
	ctrUUID      = "io.containerd.grpc.v1.introspection/uuid"

	// ctrSource and what follows names a registry; the value is the
	// repositories there that have the blob.
	ctrSource = "containerd.io/distribution.source."
)

// ctrStore is a containerd root in memory.
type ctrStore struct {
	*checker
	files      directory
	namespaces []*ctrNamespace
	snapshots  map[string]ctrSnapshot // by name
	blobs      map[digest.Digest]*ctrBlobFile
	layers     map[string]*ctrLayer // by the snapshot's name
	damaged    bool                 // a database cannot be read
}

// ctrLayer is a snapshot that a layer was unpacked into.
type ctrLayer struct {
	object
	snapshot string
	diff     digest.Digest
	blob     *ctrBlobFile // nil: it is not kept
}

// containerd checks a root.
func (c *checker) containerd() error {
	s := &ctrStore{checker: c, blobs: map[digest.Digest]*ctrBlobFile{}, layers: map[string]*ctrLayer{}}
	if !isDir(filepath.Join(c.opts.Root, path.Dir(ctrMeta))) {
		return fmt.Errorf("no root of containerd is there: it has no %s: %w", path.Dir(ctrMeta), errdefs.ErrNotFound)
	}
	var err error
	if s.files, err = openDirectory(c.opts.Root); err != nil {
		return err
	}
	defer s.files.close()
	s.uuid()
	if err := s.load(); err != nil {
		return err
	}
	for _, n := range s.namespaces {
		for d, rec := range n.blobs {
			s.addBlob(d, rec)
		}
		for _, name := range slices.Sorted(maps.Keys(n.images)) {
			s.image(n, name)
		}
	}
	for _, n := range s.namespaces {
		s.needed(n)
	}
	if err := s.compare(); err != nil {
		return err
	}
	if !s.damaged {
		s.leftovers()
	}
	return nil
}

// uuid looks at a file that containerd writes once and does not start without,
// if it is there.
func (s *ctrStore) uuid() {
	data, err := readSmall(s.files, ctrUUID)
	if err == nil && len(strings.TrimSpace(string(data))) != len("00000000-0000-0000-0000-000000000000") {
		err = errors.New("it is no UUID")
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return
	}
	o := object{c: s.checker, name: "store", source: "remove it: containerd makes another, and does not start with this one"}
	o.unreadable(ctrUUID, err)
}

// load reads the two databases.
func (s *ctrStore) load() (err error) {
	s.namespaces, err = readNamespaces(s.opts.Root)
	if err = s.database(ctrMeta, err); err != nil {
		return err
	}
	s.snapshots, err = readSnapshots(s.opts.Root)
	unused := !slices.ContainsFunc(s.namespaces, func(n *ctrNamespace) bool { return len(n.snapshots) > 0 })
	if errors.Is(err, fs.ErrNotExist) && unused && !s.damaged {
		return nil
	}
	return s.database(ctrSnapshots, err)
}

// database reports a database that is damaged: what only it says is not
// checked. Other errors end the check.
func (s *ctrStore) database(name string, err error) error {
	if !errors.Is(err, errDamaged) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	s.damaged = true
	if size, serr := s.files.stat(name); serr == nil && size == 0 {
		err = errEmpty
	}
	o := object{c: s.checker, name: "store"}
	o.unreadable(name, err)
	return nil
}

// qualified is a name with its namespace, where there are several.
func (s *ctrStore) qualified(n *ctrNamespace, name string) string {
	if len(s.namespaces) > 1 {
		return n.name + "/" + name
	}
	return name
}

// image follows one image.
func (s *ctrStore) image(n *ctrNamespace, name string) {
	s.report.Images++
	target := n.images[name]
	o := &object{c: s.checker, name: "image " + s.qualified(n, name), images: []string{s.qualified(n, name)}}
	if err := target.Digest.Validate(); err != nil {
		o.found(Record, place{path: ctrMeta}, "it is digest %q: %v", target.Digest, err)
		return
	}
	o.source = fetch(target.Digest, name)
	g := &graph{
		folder: ctrContent, document: s.document, held: n.has,
		reach: func(o *object, d ocispec.Descriptor, _ digest.Digest) {
			if n.has(d) {
				s.blobs[d.Digest].belongs(o, name)
			}
		},
		// containerd fetches the platforms that it is asked for.
		absent: func(*object, digest.Digest, ocispec.Descriptor) {},
	}
	if !n.has(target) {
		o.found(Missing, place{path: ctrMeta}, "its manifest %s is not recorded", target.Digest)
		return
	}
	usable, understood := false, true
	for _, m := range g.manifests(o, target) {
		usable = s.unpacked(o, n, m) || usable
		understood = understood && (m.diffs != nil || m.about || !n.has(m.config))
	}
	if understood && !usable && s.document(target) != nil {
		o.found(Missing, place{path: ctrMeta}, "no platform of it has all its layers, as blobs or unpacked")
	}
}

func (n *ctrNamespace) has(d ocispec.Descriptor) bool {
	_, ok := n.blobs[d.Digest]
	return ok
}

// unpacked notes the snapshots that a manifest's layers were unpacked into. It
// tells whether an image can be run from what is recorded.
func (s *ctrStore) unpacked(o *object, n *ctrNamespace, m manifest) bool {
	if m.about || m.diffs == nil {
		return false
	}
	blobs, snapshot := true, false
	for i, diff := range m.diffs {
		chain := identity.ChainID(m.diffs[:i+1]).String()
		var blob *ctrBlobFile
		if n.has(m.layers[i]) {
			blob = s.blobs[m.layers[i].Digest]
		}
		blobs = blobs && blob != nil
		var name string
		if name, snapshot = n.snapshots[chain]; !snapshot {
			continue
		}
		l := s.layers[name]
		if l == nil {
			l = &ctrLayer{object: object{c: s.checker, name: "layer " + chain}, snapshot: name, diff: diff, blob: blob}
			s.layers[name] = l
		}
		l.blob = cmp.Or(l.blob, blob)
		if !slices.Contains(l.images, o.images[0]) {
			l.images = append(l.images, o.images[0])
		}
	}
	return blobs || snapshot
}

// needed looks at what a namespace needs besides its images.
func (s *ctrStore) needed(n *ctrNamespace) {
	for _, id := range slices.Sorted(maps.Keys(n.containers)) {
		c := n.containers[id]
		if _, ok := n.snapshots[c.key]; c.snapshotter == overlayfs && c.key != "" && !ok {
			o := object{c: s.checker, name: "container " + s.qualified(n, id)}
			if c.image != "" {
				o.images = []string{s.qualified(n, c.image)}
			}
			o.found(Missing, place{path: ctrMeta}, "its snapshot %q is not recorded", c.key)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(n.snapshots)) {
		s.snapshot(s.qualified(n, key), n.snapshots[key])
	}
	for _, name := range slices.Sorted(maps.Keys(n.others)) {
		s.add(Finding{
			Kind: Unchecked, Severity: layout.Notice, Object: "store", Path: ctrMeta,
			Detail: fmt.Sprintf("%d snapshots of snapshotter %s in namespace %s are not compared", n.others[name], name, n.name),
		})
	}
}

// snapshot looks whether a snapshot is there. What a container has written
// into one nobody has recorded.
func (s *ctrStore) snapshot(key, name string) {
	if s.snapshots == nil {
		return
	}
	o := &object{c: s.checker, name: "snapshot " + key}
	if l := s.layers[name]; l != nil {
		l.again()
		o = &l.object
	}
	rec, ok := s.snapshots[name]
	if !ok {
		o.found(Missing, place{path: ctrSnapshots}, "it has no snapshot %q", name)
		return
	}
	if _, ok := s.snapshots[rec.parent]; rec.parent != "" && !ok {
		o.found(Missing, place{path: ctrSnapshots}, "it has no snapshot %q, which is the parent of %q", rec.parent, name)
	}
	if at := rec.tree(); !s.files.isDir(at) {
		o.found(Missing, place{path: at}, "its tree is not there")
	}
}

// tree is where a snapshot's files stand.
func (s ctrSnapshot) tree() string { return path.Join(ctrTrees, strconv.FormatUint(s.id, 10), "fs") }

// leftovers reports trees and blobs that nothing names.
func (s *ctrStore) leftovers() {
	ids := map[string]bool{}
	for _, rec := range s.snapshots {
		ids[strconv.FormatUint(rec.id, 10)] = true
	}
	names, _ := s.files.list(ctrTrees)
	for _, name := range names {
		if !ids[name] {
			s.unnamedTree(path.Join(ctrTrees, name), "fs")
		}
	}
	algorithms, _ := s.files.list(path.Join(ctrContent, "blobs"))
	for _, a := range algorithms {
		names, _ := s.files.list(path.Join(ctrContent, "blobs", a))
		for _, name := range names {
			if s.blobs[digest.NewDigestFromEncoded(digest.Algorithm(a), name)] == nil {
				s.unnamed(path.Join(ctrContent, "blobs", a, name), "a blob")
			}
		}
	}
}
