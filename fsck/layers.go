package fsck

import (
	"fmt"
	"path"
	"slices"

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

// layerKey: L5.
func (c *checker) layerKey(f found) {
	for key, ids := range c.rec.layerKeys {
		object := fmt.Sprintf("layer key %q", key)
		if len(ids) == 0 {
			f(object, "", "it names no layer")
		}
		for _, id := range ids {
			rec, ok := c.rec.layers[id]
			switch {
			case !ok && !c.exists(layout.LayerNode(id)):
				f(object, "", "its layer %s is not recorded", id)
			case ok && rec.Key() != key:
				f(object, "", "its layer %s has the key %q", id, rec.Key())
			}
		}
	}
	for id, rec := range c.rec.layers {
		key := rec.Key()
		if key != "" && !slices.Contains(c.rec.layerKeys[key], id) && !c.rec.unreadable[layout.BucketLayerKeys+"/"+key] {
			f(layerObject(id), "", "its key %q does not name it", key)
		}
	}
}
