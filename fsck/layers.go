package fsck

import (
	"fmt"
	"path"

	"varve.dev/layout"
)

func layerObject(id layout.LayerID) string { return "layer " + string(id) }

func treePath(id layout.LayerID) string { return path.Join(layout.LayerPath(id), layout.TreeDir) }

// layerStands: L1. What stands in staging instead is G2's, whose repair is the
// better one.
func (c *checker) layerStands(f found) {
	staged := map[layout.LayerID]bool{}
	for _, id := range c.onlyStaged() {
		staged[id] = true
	}
	for id := range c.rec.layers {
		if staged[id] {
			continue
		}
		if rel := treePath(id); !c.isDir(layout.LayerPath(id)) || !c.isDir(rel) {
			f(layerObject(id), rel, "the directory is missing")
		}
	}
}

// layerNamed: L2.
func (c *checker) layerNamed(f found) {
	c.unnamed(f, layout.LayersDir, func(name string) bool { return c.exists(layout.LayerNode(layout.LayerID(name))) })
	for id := range c.rec.layers {
		c.strangers(f, layout.LayerPath(id), layout.TreeDir)
	}
}

// layerKey: L5. Of two layers with one key the index names either.
func (c *checker) layerKey(f found) {
	for key, id := range c.rec.layerKeys {
		rec, ok := c.rec.layers[id]
		switch {
		case !ok && !c.exists(layout.LayerNode(id)):
			f(fmt.Sprintf("layer key %q", key), "", "its layer %s is not recorded", id)
		case ok && rec.Key() != key:
			f(fmt.Sprintf("layer key %q", key), "", "its layer %s has the key %q", id, rec.Key())
		}
	}
	for id, rec := range c.rec.layers {
		key := rec.Key()
		if _, ok := c.rec.layerKeys[key]; key != "" && !ok && !c.rec.unreadable[layout.BucketLayerKeys+"/"+key] {
			f(layerObject(id), "", "nothing has its key %q", key)
		}
	}
}
