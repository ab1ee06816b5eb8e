package fsck

import (
	"fmt"
	"maps"
	"strconv"
	"strings"

	"github.com/cespare/xxhash/v2"
	"github.com/distribution/reference"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// What a check is of: the store or what was chosen of it, and of that all
// contents or a sample.

// choose finds what the options name, and all that it stands on. Without
// records that cannot be known, and all there is to say is about the database.
func (c *checker) choose() error {
	if len(c.state.Of) == 0 || c.rec == nil {
		return nil
	}
	c.chosen = map[string]bool{theDatabase: true}
	// Edges that are stored by half, or that only the records call for, lead
	// to what is chosen as well.
	edges := map[layout.Edge]bool{}
	c.calledFor(func(parent layout.Node, rel string, child layout.Node) {
		edges[layout.Edge{Parent: parent, Rel: rel, Child: child}] = true
	})
	maps.Copy(edges, c.rec.edges)
	maps.Copy(edges, c.rec.back)
	below := map[layout.Node][]layout.Node{}
	for e := range edges {
		below[e.Parent] = append(below[e.Parent], e.Child)
	}
	seen := map[layout.Node]bool{}
	var add func(layout.Node)
	add = func(n layout.Node) {
		if seen[n] {
			return
		}
		seen[n] = true
		for _, child := range below[n] {
			add(child)
		}
	}
	for _, name := range c.state.Of {
		nodes := c.named(name)
		if len(nodes) == 0 {
			return fmt.Errorf("no image, container, layer or blob is called %q, or more than one is: %w", name, errdefs.ErrNotFound)
		}
		for _, n := range nodes {
			add(n)
		}
	}
	for n := range seen {
		for _, object := range objects(n) {
			c.chosen[object] = true
		}
	}
	c.within = seen
	return nil
}

// objects are what findings call a node.
func objects(n layout.Node) []string {
	kind, id := n.Split()
	out := []string{fmt.Sprintf("node %q", string(n)), fmt.Sprintf("record %s/%q", buckets[kind], id)}
	switch kind {
	case layout.KindBlob:
		out = append(out, blobObject(layout.BlobDigest(id)))
	case layout.KindLayer:
		out = append(out, layerObject(layout.LayerID(id)))
	case layout.KindSnapshot:
		out = append(out, snapshotObject(layout.SnapshotKey(id)))
	case layout.KindImage:
		out = append(out, imageObject(id))
	case layout.KindContainer:
		out = append(out, "container "+id)
	}
	return out
}

// leastID is how much of an id says which it is.
const leastID = 4

// named returns what people mean by a name: an image by its name, digest or
// id; a container by its name or id; a layer by its id, a blob by its digest. Of
// ids and digests the beginning is enough, if only one begins so.
func (c *checker) named(name string) []layout.Node {
	if n := layout.ImageNode(name); c.exists(n) {
		return []layout.Node{n}
	}
	if ref, err := reference.ParseDockerRef(name); err == nil {
		if n := layout.ImageNode(ref.String()); c.exists(n) {
			return []layout.Node{n}
		}
	}
	for id, rec := range c.rec.containers {
		if rec.Name == name {
			return []layout.Node{layout.ContainerNode(id)}
		}
	}
	var found []layout.Node
	begins := func(id string) bool { return len(name) >= leastID && strings.HasPrefix(id, name) }
	for id := range c.rec.containers {
		if begins(string(id)) {
			found = append(found, layout.ContainerNode(id))
		}
	}
	for id := range c.rec.layers {
		if begins(string(id)) {
			found = append(found, layout.LayerNode(id))
		}
	}
	for d := range c.rec.blobs {
		if begins(string(d)) && len(name) >= leastID+len("sha256:") || begins(d.Hex()) {
			found = append(found, layout.BlobNode(d))
		}
	}
	if len(found) != 1 {
		return nil // none, or not one
	}
	if kind, id := found[0].Split(); kind == layout.KindBlob {
		found = append(found, c.imagesOf(layout.BlobDigest(id))...)
	}
	return found
}

// imagesOf returns the manifests whose config a blob is: by that, an image has
// its id.
func (c *checker) imagesOf(config layout.BlobDigest) (manifests []layout.Node) {
	for e := range c.rec.edges {
		kind, id := e.Parent.Split()
		if e.Child != layout.BlobNode(config) || e.Rel != layout.RelContent || kind != layout.KindBlob {
			continue
		}
		var doc document
		if c.readJSON(layout.BlobDigest(id), &doc) && doc.Config != nil && layout.BlobDigest(doc.Config.Digest) == config {
			manifests = append(manifests, e.Parent)
		}
	}
	return manifests
}

// isChosen tells whether what is wrong with an object is to be said; of an edge,
// if its parent is chosen.
func (c *checker) isChosen(object string) bool {
	if c.chosen == nil || c.chosen[object] {
		return true
	}
	edge, ok := strings.CutPrefix(object, "edge ")
	if !ok {
		return false
	}
	quoted, _ := strconv.QuotedPrefix(edge)
	parent, err := strconv.Unquote(quoted)
	return err == nil && c.within[layout.Node(parent)]
}

// concerns tells whether an object is looked at at all: at the second look
// those are that something was wrong with.
func (c *checker) concerns(object string) bool {
	return c.isChosen(object) && (c.only == nil || c.only[object])
}

// count is how many blobs and layers are recorded and chosen.
func (c *checker) count() (blobs, layers int) {
	for d := range c.rec.blobs {
		if c.isChosen(blobObject(d)) {
			blobs++
		}
	}
	for id := range c.rec.layers {
		if c.isChosen(layerObject(id)) {
			layers++
		}
	}
	return blobs, layers
}

// drawn tells whether the contents that are called so are in the sample. The
// same are in it whenever a check goes on.
func (c *checker) drawn(name string) bool {
	if c.state.Sample == 0 {
		return true
	}
	var d xxhash.Digest
	d.ResetWithSeed(c.state.Draw)
	_, _ = d.WriteString(name)
	return float64(d.Sum64()) < c.state.Sample*(1<<64)
}
