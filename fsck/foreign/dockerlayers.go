package foreign

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
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
	for _, chain := range chains {
		d.layer(chain, "")
	}
	for chain, l := range d.layers {
		if l.gone = !slices.Contains(chains, chain); l.gone {
			d.blind = true // its tree may be there
			l.found(Missing, place{path: l.file("")}, "layerdb does not have it")
			continue
		}
		d.loadLayer(l)
		d.blind = d.blind || l.cache == ""
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
	l.parent = digest.Digest(d.record(l, "parent", string(said.parent), func(s string) error {
		if s == "" && said.parent == "" {
			return nil
		}
		return validDigest(s)
	}))
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
	o.unreadable(l.file(name), data, err)
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
	d.descend(l)
	folder := object{c: l.c, name: l.name, images: l.images, source: "write it again from layerdb"}
	link := path.Join(l.cache, "link")
	data, err := readSmall(d.trees, link)
	if err != nil || len(data) == 0 {
		folder.unreadable(path.Join(dockerTrees, link), data, cmpErr(err, errors.New("0 bytes")))
	} else if at := path.Join(dockerLinks, path.Base(string(data))); !d.leads(at, l.cache) {
		folder.found(Missing, place{path: path.Join(dockerTrees, at)}, "no link to %s", l.cache)
	}
	if l.depth == 0 {
		return
	}
	lower := path.Join(l.cache, "lower")
	data, err = readSmall(d.trees, lower)
	if err == nil && len(data) > 0 {
		err = d.lowers(string(data), l.depth)
	}
	if err != nil || len(data) == 0 {
		folder.unreadable(path.Join(dockerTrees, lower), data, cmpErr(err, errors.New("0 bytes")))
	}
}

// descend counts the layers below another, which all have to be there. That an
// image's is not has been said.
func (d *dockerStore) descend(l *dockerLayer) {
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
		l.unreadable(folder, nil, err)
		return
	}
	defer root.Close()
	name := path.Join(dockerLayers, l.chain.Encoded(), dockerTarSplit)
	record, err := d.records.open(name)
	if err != nil {
		l.unreadable(l.file(dockerTarSplit), nil, err)
		d.uncompared(l, root)
		return
	}
	defer record.Close()
	r := &reassembly{c: d.checker, root: root, wrong: map[string]mismatch{}}
	want, sum, err := r.run(record)
	if d.ctx.Err() != nil {
		return
	}
	t := &comparison{
		object: &l.object, folder: folder, rest: "the layer's " + dockerTarSplit + " says what it was", below: d.below(l), shifted: d.shifted,
		contents: r.contents,
	}
	at := place{path: l.file(dockerTarSplit)}
	size, _ := d.records.stat(name)
	switch {
	case err != nil && size == 0:
		l.found(Empty, at, "0 bytes")
	case err != nil:
		l.found(Record, at, "%v", err)
	case want == nil && r.sparse:
		l.say(Unchecked, layout.Notice, at, "", "it has sparse files, which dockerd cannot put together again, to save or push: only files with contents are compared")
	case sum != l.diff && l.diff != "" && len(r.wrong) == 0 || want == nil:
		l.found(Record, at, "with the tree it gives a stream with the digest %s, and the DiffID is %s", sum, l.diff)
	}
	if err != nil {
		d.uncompared(l, root)
	}
	d.mu.Lock()
	d.report.Layers++
	d.mu.Unlock()
	if want != nil {
		t.run(root, want)
		return
	}
	for _, entry := range slices.Sorted(maps.Keys(r.wrong)) {
		t.file(r.wrong[entry].kind, entry, "%s", r.wrong[entry].detail)
	}
}

// uncompared says of a layer that has no record what can be seen without one.
func (d *dockerStore) uncompared(l *dockerLayer, root *os.File) {
	files, empty := countEmpty(root)
	l.say(Unchecked, layout.Notice, place{path: path.Join(dockerTrees, l.cache, "diff")}, "", "nothing says what its files must be; %d of %d are empty", empty, files)
}
