package foreign

import (
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
	"golang.org/x/sys/unix"

	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

const (
	dockerLayers   = "layerdb/sha256"
	dockerTarSplit = "tar-split.json.gz"
	dockerLinks    = "l" // in overlay2: short names of trees
)

// dockerLayer is a folder in layerdb.
type dockerLayer struct {
	object
	chain digest.Digest
	chainLink
	cache string // its folder in overlay2; empty: not known
	size  int64
	depth int // layers below it
	gone  bool
}

// layer returns a layer that something names.
func (d *dockerStore) layer(chain, diff digest.Digest) *dockerLayer {
	l := d.layers[chain]
	if l == nil {
		l = &dockerLayer{object: object{c: d.checker, name: "layer " + chain.String()}, chain: chain}
		l.source = d.sourceOf(diff)
		d.layers[chain] = l
	}
	return l
}

func (l *dockerLayer) addImages(names []string) {
	for _, name := range names {
		if !slices.Contains(l.images, name) {
			l.images = append(l.images, name)
		}
	}
	slices.Sort(l.images)
}

// file is where one of the layer's records stands in the store.
func (l *dockerLayer) file(name string) string {
	return path.Join(dockerRecords, dockerLayers, l.chain.Encoded(), name)
}

// loadLayers reads layerdb.
func (d *dockerStore) loadLayers() error {
	chains, err := d.digests(dockerLayers)
	if err != nil {
		return err
	}
	there := map[digest.Digest]bool{}
	for _, chain := range chains {
		there[chain] = true
		d.layer(chain, "")
	}
	for chain, l := range d.layers {
		if l.gone = !there[chain]; l.gone {
			l.chainLink = d.said[chain]
			l.found(Missing, place{path: l.file("")}, "layerdb does not have it")
			continue
		}
		d.loadLayer(l)
	}
	for _, l := range d.layers {
		if l.cache != "" {
			d.loadTree(l)
		}
	}
	return nil
}

// loadLayer reads a layer's records. What an image's config says of it takes
// the place of what cannot be read.
func (d *dockerStore) loadLayer(l *dockerLayer) {
	said, known := d.said[l.chain]
	l.diff = digest.Digest(d.record(l, "diff", string(said.diff), validDigest))
	l.parent = digest.Digest(d.record(l, "parent", string(said.parent), validDigest))
	l.cache = d.record(l, "cache-id", "", func(s string) error {
		if s == "" || s != filepath.Base(s) || !filepath.IsLocal(s) {
			return fmt.Errorf("%q is no folder's name", s)
		}
		return nil
	})
	d.record(l, "size", "", func(s string) (err error) {
		l.size, err = strconv.ParseInt(s, 10, 64)
		return err
	})
	if !known {
		l.source = d.sourceOf(l.diff)
	}
	if chain := chainOf(l.parent, l.diff); l.diff != "" && chain != l.chain {
		l.found(Record, place{path: l.file("")}, "diff and parent give the ChainID %s", chain)
		if known {
			l.chainLink = said
		}
	}
}

// record reads one of a layer's records; must is what an image says of it. The
// lowest layer has no parent.
func (d *dockerStore) record(l *dockerLayer, name, must string, valid func(string) error) string {
	data, err := readSmall(d.records, path.Join(dockerLayers, l.chain.Encoded(), name))
	text := strings.TrimSpace(string(data))
	lowest := name == "parent" && must == "" && errors.Is(err, fs.ErrNotExist)
	if err == nil {
		err = valid(text)
	}
	if err == nil || lowest {
		return text
	}
	o := l.object
	switch {
	case must != "":
		o.source = "write " + must
	case name == "size":
		o.source = "write the number of bytes in its files"
	}
	o.unreadable(l.file(name), err)
	return must
}

func validDigest(s string) error { return digest.Digest(s).Validate() }

func chainOf(parent, diff digest.Digest) digest.Digest {
	if parent == "" {
		return diff
	}
	return identity.ChainID([]digest.Digest{parent, diff})
}

// loadTree looks at what overlay2 notes of a layer's tree. It can all be
// written again from what the layers' records say.
func (d *dockerStore) loadTree(l *dockerLayer) {
	d.taken[l.cache] = true
	d.countBelow(l)
	folder := object{c: l.c, name: l.name, images: l.images, source: "write it again from layerdb"}
	link := path.Join(l.cache, "link")
	data, err := readSmall(d.trees, link)
	if err != nil {
		folder.unreadable(path.Join(dockerTrees, link), err)
	} else if at := path.Join(dockerLinks, path.Base(string(data))); !d.leads(at, l.cache) {
		folder.found(Missing, place{path: path.Join(dockerTrees, at)}, "no link to %s", l.cache)
	}
	if l.depth == 0 {
		return
	}
	lower := path.Join(l.cache, "lower")
	if data, err = readSmall(d.trees, lower); err == nil {
		err = d.lowers(string(data), l.depth)
	}
	if err != nil {
		folder.unreadable(path.Join(dockerTrees, lower), err)
	}
}

// countBelow counts the layers below another, which all have to be there. That an
// image's is not has been said.
func (d *dockerStore) countBelow(l *dockerLayer) {
	for up := l; up.parent != "" && l.depth <= len(d.layers); l.depth++ {
		next := d.layers[up.parent]
		if next == nil {
			l.found(Missing, place{path: l.file("parent")}, "the layer %s below it is not there", up.parent)
			return
		}
		up = next
	}
}

// leads tells whether a short name leads to a tree.
func (d *dockerStore) leads(link, cache string) bool {
	to, err := d.trees.root.Readlink(link)
	return err == nil && to == path.Join("..", cache, "diff")
}

// lowers checks the list of the layers below, by their short names.
func (d *dockerStore) lowers(list string, depth int) error {
	links := strings.Split(list, ":")
	if len(links) != depth {
		return fmt.Errorf("%d layers, must be %d", len(links), depth)
	}
	for _, link := range links {
		to, err := d.trees.root.Readlink(link)
		if err != nil {
			return err
		}
		if !d.trees.isDir(path.Join(dockerLinks, to)) {
			return fmt.Errorf("%s leads to %s, which is not there", link, to)
		}
	}
	return nil
}

// below are the trees under a layer's.
func (d *dockerStore) below(l *dockerLayer) (out stack) {
	for up := d.layers[l.parent]; up != nil && up.cache != "" && len(out) <= len(d.layers); up = d.layers[up.parent] {
		out = append(out, filepath.Join(d.opts.Root, dockerTrees, up.cache, "diff"))
	}
	return out
}

// compareLayer compares a layer's tree with what tar-split has recorded.
func (d *dockerStore) compareLayer(l *dockerLayer) {
	folder := path.Join(dockerTrees, l.cache, "diff")
	root, err := reach.Dir(unix.AT_FDCWD, filepath.Join(d.opts.Root, folder))
	if err != nil {
		l.unreadable(folder, err)
		return
	}
	defer root.Close()
	r := &reassembly{c: d.checker, root: root, wrong: map[string]mismatch{}}
	want := d.reassemble(l, r)
	if d.ctx.Err() != nil {
		return
	}
	d.mu.Lock()
	d.report.Layers++
	d.mu.Unlock()
	t := &comparison{
		object: &l.object, folder: folder, rest: "the layer's " + dockerTarSplit + " says what it was",
		contents: r.contents, below: d.below(l), shifted: d.shifted,
	}
	if want != nil {
		t.run(root, want)
		return
	}
	for _, entry := range slices.Sorted(maps.Keys(r.wrong)) {
		t.file(r.wrong[entry].kind, entry, "%s", r.wrong[entry].detail)
	}
}

// reassemble puts a layer's stream together, reports what is wrong with the
// record, and returns the tree that it makes; nil: it makes none, and only what
// r.wrong has is known.
func (d *dockerStore) reassemble(l *dockerLayer, r *reassembly) *node {
	record, err := d.records.open(path.Join(dockerLayers, l.chain.Encoded(), dockerTarSplit))
	var want *node
	var sum digest.Digest
	if err == nil {
		defer record.Close()
		want, sum, err = r.run(record)
	}
	at := place{path: l.file(dockerTarSplit)}
	switch {
	case d.ctx.Err() != nil:
	case err != nil:
		files, empty := countEmpty(r.root)
		l.unreadable(at.path, err)
		tree := place{path: path.Join(dockerTrees, l.cache, "diff")}
		l.say(Unchecked, layout.Notice, tree, "", "nothing says what all of its %d files must be; %d of them are empty", files, empty)
	case want == nil && r.sparse:
		l.say(Unchecked, layout.Notice, at, "", "it has sparse files, which dockerd cannot put together again, to save or push: only files with contents are compared")
	case want == nil, sum != l.diff && l.diff != "" && len(r.wrong) == 0:
		l.found(Record, at, "with the tree it gives a stream with the digest %s, and the DiffID is %s", sum, l.diff)
	}
	return want
}
