package fsck

import (
	"fmt"

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

// edgeEnds: E2. What an operation under way holds may not be there yet.
func (c *checker) edgeEnds(f found) {
	for e := range c.rec.edges {
		if !c.exists(e.Parent) {
			f(edgeObject(e), "", "its parent does not exist")
		}
		if !c.exists(e.Child) && !(c.online() && temporary(e.Parent)) {
			f(edgeObject(e), "", "its child does not exist")
		}
	}
}

// exists tells whether what a node stands for is recorded, readable or not;
// of the directory of a writable layer, whether it is there, or an intent is
// making a layer of it.
func (c *checker) exists(n layout.Node) bool {
	kind, id := n.Split()
	ok, bucket := false, ""
	switch kind {
	case layout.KindBlob:
		_, ok = c.rec.blobs[layout.BlobDigest(id)]
		bucket = layout.BucketBlobs
	case layout.KindLayer:
		_, ok = c.rec.layers[layout.LayerID(id)]
		bucket = layout.BucketLayers
	case layout.KindSnapshot:
		_, ok = c.rec.snapshots[layout.SnapshotKey(id)]
		bucket = layout.BucketSnapshots
	case layout.KindImage:
		_, ok = c.rec.images[id]
		bucket = layout.BucketImages
	case layout.KindContainer:
		_, ok = c.rec.containers[layout.ContainerID(id)]
		bucket = layout.BucketContainers
	case layout.KindLease:
		_, ok = c.rec.leases[layout.LeaseID(id)]
		bucket = layout.BucketLeases
	case layout.KindCache:
		_, ok = c.rec.cache[id]
		bucket = layout.BucketCache
	case layout.KindIntent:
		_, ok = c.rec.intents[layout.IntentID(id)]
		bucket = layout.BucketIntents
	case layout.KindActive:
		rel := layout.ActivePath(layout.LayerID(id))
		return elementKey(id) == nil && (!c.gone(rel) || c.underWay()[rel])
	case layout.KindAPI:
		return n == layout.ContainerdNode
	}
	return ok || c.rec.unreadable[bucket+"/"+id]
}

// edgeCalledFor: E3. An edge to what does not exist is not asked for: its
// record has a finding of its own.
func (c *checker) edgeCalledFor(f found) {
	need := func(parent layout.Node, rel string, child layout.Node) {
		e := layout.Edge{Parent: parent, Rel: rel, Child: child}
		if !c.rec.edges[e] && !c.rec.back[e] && c.exists(child) {
			f(edgeObject(e), "", "the record calls for it and it is not stored")
		}
	}
	for key, s := range c.rec.snapshots {
		n := layout.SnapshotNode(key)
		if s.Parent != "" {
			need(n, layout.RelParent, layout.SnapshotNode(s.Parent))
		}
		switch {
		case s.Kind == layout.SnapshotCommitted:
			need(n, layout.RelTree, layout.LayerNode(s.Layer))
		case writable(s):
			need(n, layout.RelTree, layout.ActiveNode(s.Layer))
		}
	}
	for id, l := range c.rec.layers {
		need(layout.LayerNode(id), layout.RelFiles, layout.BlobNode(l.Manifest))
	}
	for name, i := range c.rec.images {
		need(layout.ImageNode(name), layout.RelTarget, layout.BlobNode(layout.BlobDigest(i.Target.Digest)))
	}
	for key, r := range c.rec.cache {
		for _, s := range r.Snapshots {
			need(layout.CacheNode(key), layout.RelResult, layout.SnapshotNode(s))
		}
	}
	for id, r := range c.rec.containers {
		need(layout.ContainerNode(id), layout.RelRootfs, layout.SnapshotNode(r.Snapshot))
	}
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
