package fsck

import (
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/layout"
)

func edgeObject(e layout.Edge) string {
	return fmt.Sprintf("edge %q -%s-> %q", string(e.Parent), e.Rel, string(e.Child))
}

// edgeBothWays: E1.
func (c *checker) edgeBothWays(f found) {
	for e := range c.rec.edges {
		if !c.rec.back[e] {
			f(edgeObject(e), "", "it is not stored parent first")
		}
	}
	for e := range c.rec.back {
		if !c.rec.edges[e] {
			f(edgeObject(e), "", "it is not stored child first")
		}
	}
}

// edgeEnds: E2. What an operation under way holds may not be there yet, and
// that a snapshot's own directory is not is S3's to say.
func (c *checker) edgeEnds(f found) {
	own := map[layout.Node]bool{}
	for _, s := range c.rec.snapshots {
		if writable(s) {
			own[layout.ActiveNode(s.Layer)] = true
		}
	}
	for e := range c.rec.edges {
		if !c.exists(e.Parent) {
			f(edgeObject(e), "", "its parent does not exist")
		}
		if !c.exists(e.Child) && !own[e.Child] && !(c.online() && temporary(e.Parent)) {
			f(edgeObject(e), "", "its child does not exist")
		}
	}
}

// exists tells whether what a node stands for is recorded, readable or not;
// of the directory of a writable layer, whether it is there, or an intent is
// making a layer of it.
func (c *checker) exists(n layout.Node) bool {
	kind, id := n.Split()
	ok := false
	switch kind {
	case layout.KindBlob:
		_, ok = c.rec.blobs[layout.BlobDigest(id)]
	case layout.KindLayer:
		_, ok = c.rec.layers[layout.LayerID(id)]
	case layout.KindSnapshot:
		_, ok = c.rec.snapshots[layout.SnapshotKey(id)]
	case layout.KindImage:
		_, ok = c.rec.images[id]
	case layout.KindContainer:
		_, ok = c.rec.containers[layout.ContainerID(id)]
	case layout.KindLease:
		_, ok = c.rec.leases[layout.LeaseID(id)]
	case layout.KindCache:
		_, ok = c.rec.cache[id]
	case layout.KindIntent:
		_, ok = c.rec.intents[layout.IntentID(id)]
	case layout.KindActive:
		rel := layout.ActivePath(layout.LayerID(id))
		return elementKey(id) == nil && (!c.gone(rel) || c.underWay()[rel])
	case layout.KindAPI:
		return n == layout.ContainerdNode
	}
	return ok || c.rec.unreadable[buckets[kind]+"/"+id]
}

// buckets have the records of nodes, by kind.
var buckets = map[string]string{
	layout.KindBlob: layout.BucketBlobs, layout.KindLayer: layout.BucketLayers, layout.KindSnapshot: layout.BucketSnapshots,
	layout.KindImage: layout.BucketImages, layout.KindContainer: layout.BucketContainers, layout.KindLease: layout.BucketLeases,
	layout.KindCache: layout.BucketCache, layout.KindIntent: layout.BucketIntents,
}

// edgeCalledFor: E3. A record that names what does not exist has a finding of
// its own: no edge is asked for, and of the one it has nothing is said.
func (c *checker) edgeCalledFor(f found) {
	type relation struct {
		of  layout.Node
		rel string
	}
	called, lost := map[layout.Edge]bool{}, map[relation]bool{}
	c.calledFor(func(parent layout.Node, rel string, child layout.Node) {
		e := layout.Edge{Parent: parent, Rel: rel, Child: child}
		called[e] = true
		switch {
		case !c.exists(child):
			lost[relation{parent, rel}] = true
		case !c.stored(e):
			f(edgeObject(e), "", "the record calls for it and it is not stored")
		}
	})
	for e := range c.rec.edges {
		if layout.RecordTells(e.Rel) && !called[e] && !lost[relation{e.Parent, e.Rel}] && c.readable(e.Parent) && c.exists(e.Child) {
			f(edgeObject(e), "", "it is stored and the record does not call for it")
		}
	}
	c.contentEdges(f)
}

// stored tells whether at least half of an edge is: E1 says if it is not all.
func (c *checker) stored(e layout.Edge) bool { return c.rec.edges[e] || c.rec.back[e] }

// readable tells whether a record is there and decodes.
func (c *checker) readable(n layout.Node) bool {
	kind, id := n.Split()
	return c.exists(n) && !c.rec.unreadable[buckets[kind]+"/"+id]
}

// calledFor calls edge for each record and what it names.
func (c *checker) calledFor(edge func(parent layout.Node, rel string, child layout.Node)) {
	for key, s := range c.rec.snapshots {
		n := layout.SnapshotNode(key)
		if s.Parent != "" {
			edge(n, layout.RelParent, layout.SnapshotNode(s.Parent))
		}
		switch {
		case s.Kind == layout.SnapshotCommitted:
			edge(n, layout.RelTree, layout.LayerNode(s.Layer))
		case writable(s):
			edge(n, layout.RelTree, layout.ActiveNode(s.Layer))
		}
	}
	for id, l := range c.rec.layers {
		edge(layout.LayerNode(id), layout.RelFiles, layout.BlobNode(l.Manifest))
	}
	for name, i := range c.rec.images {
		edge(layout.ImageNode(name), layout.RelTarget, layout.BlobNode(layout.BlobDigest(i.Target.Digest)))
	}
	for key, r := range c.rec.cache {
		for _, s := range r.Snapshots {
			edge(layout.CacheNode(key), layout.RelResult, layout.SnapshotNode(s))
		}
	}
	for id, r := range c.rec.containers {
		edge(layout.ContainerNode(id), layout.RelRootfs, layout.SnapshotNode(r.Snapshot))
	}
}

// contentEdges compares those between blobs with what manifests and indexes
// say. A manifest has to hold its config, and its layers if it is not unpacked:
// of a layer that stood there unpacked the blob was not fetched.
func (c *checker) contentEdges(f found) {
	unpacked := c.unpacked()
	c.eachManifest(func(_ string, d layout.BlobDigest, doc document) {
		children := []ocispec.Descriptor{*doc.Config}
		if len(unpacked[layout.BlobNode(d)]) == 0 {
			children = append(children, doc.Layers...)
		}
		for _, child := range children {
			e := layout.Edge{Parent: layout.BlobNode(d), Rel: layout.RelContent, Child: layout.BlobNode(layout.BlobDigest(child.Digest))}
			if !c.stored(e) && c.exists(e.Child) {
				f(edgeObject(e), "", "the manifest calls for it and it is not stored")
			}
		}
	})
	documents := map[layout.Node]map[layout.Node]bool{}
	for e := range c.rec.edges {
		if kind, id := e.Parent.Split(); e.Rel == layout.RelContent && kind == layout.KindBlob {
			children, ok := documents[e.Parent]
			if !ok {
				children = c.childrenOf(layout.BlobDigest(id))
				documents[e.Parent] = children
			}
			if children != nil && !children[e.Child] && c.exists(e.Child) {
				f(edgeObject(e), "", "it is stored and the manifest does not call for it")
			}
		}
	}
}

// childrenOf are the blobs that a manifest or index names; nil if it cannot be
// read.
func (c *checker) childrenOf(d layout.BlobDigest) map[layout.Node]bool {
	var doc document
	if !c.readJSON(d, &doc) {
		return nil
	}
	if doc.Config != nil {
		doc.Layers = append(doc.Layers, *doc.Config)
	}
	out := map[layout.Node]bool{}
	for _, child := range append(doc.Layers, doc.Manifests...) {
		out[layout.BlobNode(layout.BlobDigest(child.Digest))] = true
	}
	return out
}

// nodeReferred: E4.
func (c *checker) nodeReferred(f found) {
	held := map[layout.Node]bool{}
	for _, edges := range []map[layout.Edge]bool{c.rec.edges, c.rec.back} {
		for e := range edges {
			held[e.Child] = true
		}
	}
	need := func(n layout.Node) {
		if !held[n] {
			f(fmt.Sprintf("node %q", string(n)), "", "nothing refers to it")
		}
	}
	for d := range c.rec.blobs {
		need(layout.BlobNode(d))
	}
	for id := range c.rec.layers {
		need(layout.LayerNode(id))
	}
	for key := range c.rec.snapshots {
		need(layout.SnapshotNode(key))
	}
}
