package fsck

import (
	"fmt"

	"varve.dev/layout"
)

// databaseChecks are those that need nothing but records.
func (c *check) databaseChecks() {
	for id, in := range c.rec.intents {
		if c.opts.DB == nil {
			c.found("J1", "intent "+string(id), "", "%s is not finished", in.Purpose)
		}
	}
	c.checkSnapshots()
	c.checkImages()
	c.checkSweeps()
	if c.opts.Level != layout.Quick {
		c.checkLayerKeys()
		c.checkCache()
	}
}

// checkSnapshots: S1, S2. A chain is followed once for each snapshot, with
// what is known to end remembered.
func (c *check) checkSnapshots() {
	ends := map[layout.SnapshotKey]bool{}
	for key, rec := range c.rec.snapshots {
		if rec.Kind == layout.SnapshotCommitted {
			if _, ok := c.rec.layers[rec.Layer]; !ok {
				c.found("S2", fmt.Sprintf("snapshot %q", key), "", "its layer %q is not recorded", rec.Layer)
			}
		}
		if rec.Parent == "" {
			continue
		}
		parent, ok := c.rec.snapshots[rec.Parent]
		switch {
		case !ok:
			c.found("S1", fmt.Sprintf("snapshot %q", key), "", "its parent %q is not recorded", rec.Parent)
		case parent.Kind != layout.SnapshotCommitted:
			c.found("S1", fmt.Sprintf("snapshot %q", key), "", "its parent %q is %s", rec.Parent, parent.Kind)
		case !c.ends(key, ends):
			c.found("S1", fmt.Sprintf("snapshot %q", key), "", "its parents form a circle")
		}
	}
}

func (c *check) ends(key layout.SnapshotKey, known map[layout.SnapshotKey]bool) bool {
	seen := map[layout.SnapshotKey]bool{}
	for at := key; at != "" && !known[at]; at = c.rec.snapshots[at].Parent {
		if seen[at] {
			return false
		}
		seen[at] = true
	}
	for at := range seen {
		known[at] = true
	}
	return true
}

// checkImages: I1.
func (c *check) checkImages() {
	for name, rec := range c.rec.images {
		if _, ok := c.rec.blobs[layout.BlobDigest(rec.Target.Digest)]; !ok {
			c.found("I1", fmt.Sprintf("image %q", name), "", "its target %s is not recorded", rec.Target.Digest)
		}
	}
}

// checkLayerKeys: L5.
func (c *check) checkLayerKeys() {
	for key, id := range c.rec.layerKeys {
		rec, ok := c.rec.layers[id]
		if !ok {
			c.found("L5", fmt.Sprintf("layer key %q", key), "", "its layer %s is not recorded", id)
		} else if rec.Key() != key {
			c.found("L5", fmt.Sprintf("layer key %q", key), "", "its layer %s has the key %q", id, rec.Key())
		}
	}
	for id, rec := range c.rec.layers {
		if key := rec.Key(); key != "" && c.rec.layerKeys[key] == "" {
			c.found("L5", "layer "+string(id), "", "nothing has its key %q", key)
		}
	}
}

// checkCache: K1.
func (c *check) checkCache() {
	for key, rec := range c.rec.cache {
		object := fmt.Sprintf("cache %q", key)
		for _, s := range rec.Snapshots {
			if snap, ok := c.rec.snapshots[s]; !ok || snap.Kind != layout.SnapshotCommitted {
				c.found("K1", object, "", "its result %q is no committed snapshot", s)
			}
		}
		if at, ok := c.rec.byUse[key]; !ok || !at.Equal(rec.LastUse) {
			c.found("K1", object, "", "its place by last use is %v, its record says %v", at, rec.LastUse)
		}
	}
	for key := range c.rec.byUse {
		if _, ok := c.rec.cache[key]; !ok {
			c.found("K1", fmt.Sprintf("cache %q", key), "", "a place by last use without a record")
		}
	}
}
