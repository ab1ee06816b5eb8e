package fsck

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"

	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

func snapshotObject(k layout.SnapshotKey) string { return fmt.Sprintf("snapshot %q", string(k)) }

// snapshotParent: S1.
func (c *checker) snapshotParent(f found) {
	ends := map[layout.SnapshotKey]bool{}
	for key, rec := range c.rec.snapshots {
		if rec.Parent == "" {
			continue
		}
		parent, ok := c.rec.snapshots[rec.Parent]
		switch {
		case !ok && !c.exists(layout.SnapshotNode(rec.Parent)):
			f(snapshotObject(key), "", "its parent %q is not recorded", rec.Parent)
		case ok && parent.Kind != layout.SnapshotCommitted:
			f(snapshotObject(key), "", "its parent %q is %s", rec.Parent, parent.Kind)
		case !c.ends(key, ends):
			f(snapshotObject(key), "", "its parents form a circle")
		}
	}
}

// ends follows parents, and remembers of which it is known that they end.
func (c *checker) ends(key layout.SnapshotKey, known map[layout.SnapshotKey]bool) bool {
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

// snapshotLayer: S2.
func (c *checker) snapshotLayer(f found) {
	for key, rec := range c.rec.snapshots {
		if rec.Kind == layout.SnapshotCommitted && !c.exists(layout.LayerNode(rec.Layer)) {
			f(snapshotObject(key), "", "its layer %q is not recorded", rec.Layer)
		}
	}
}

// writable tells whether a snapshot has a directory in active: an active one,
// or a view on no parent.
func writable(rec layout.SnapshotRecord) bool {
	return rec.Kind == layout.SnapshotActive || rec.Kind == layout.SnapshotView && rec.Layer != ""
}

// activeStands: S3. The work directory is overlayfs's scratch: a commit that
// did not come to pass took it away, and the next mount makes it again.
func (c *checker) activeStands(f found) {
	under := c.underWay()
	for key, rec := range c.rec.snapshots {
		if !writable(rec) {
			continue
		}
		if elementKey(string(rec.Layer)) != nil {
			f(snapshotObject(key), "", "%q cannot be the name of its directory", rec.Layer)
			continue
		}
		rel := layout.ActivePath(rec.Layer)
		work := path.Join(rel, layout.WorkDir)
		switch {
		case under[rel]:
		case !c.isDir(path.Join(rel, layout.TreeDir)):
			f(snapshotObject(key), rel, "its directory %s is missing", layout.TreeDir)
		case !c.isDir(work) && !c.gone(work):
			f(snapshotObject(key), rel, "%s is no directory", layout.WorkDir)
		}
	}
}

// activeNamed: S4. What a record that cannot be read (M1) names is what its
// edge leads to.
func (c *checker) activeNamed(f found) {
	named := map[string]bool{}
	for e := range c.rec.edges {
		kind, id := e.Child.Split()
		if kind == layout.KindActive && c.exists(e.Parent) && !c.readable(e.Parent) {
			named[id] = true
		}
	}
	for _, rec := range c.rec.snapshots {
		if writable(rec) {
			named[string(rec.Layer)] = true
		}
	}
	c.unnamed(f, layout.ActiveDir, func(name string) bool { return named[name] })
	for id := range named {
		if elementKey(id) == nil {
			c.strangers(f, layout.ActivePath(layout.LayerID(id)), layout.TreeDir, layout.WorkDir)
		}
	}
}

// containerStands: C1.
func (c *checker) containerStands(f found) {
	for id, rec := range c.rec.containers {
		object, rel := "container "+string(id), layout.ContainerPath(id)
		if !c.isDir(rel) {
			f(object, rel, "its directory is missing")
		} else {
			for _, name := range []string{layout.ContainerConfig, layout.ContainerImage} {
				if err := c.containerFile(path.Join(rel, name)); err != nil {
					f(object, path.Join(rel, name), "%v", err)
				}
			}
		}
		if !c.exists(layout.SnapshotNode(rec.Snapshot)) {
			f(object, "", "its snapshot %q is not recorded", rec.Snapshot)
		}
	}
}

// maxContainerFile bounds what says how a container is to run.
const maxContainerFile = 64 << 20

func (c *checker) containerFile(rel string) error {
	file, err := reach.Regular(c.fd(), rel)
	if err != nil {
		return err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxContainerFile))
	if err == nil && !json.Valid(data) {
		err = errors.New("it is no JSON")
	}
	return err
}

// containerNamed: C2.
func (c *checker) containerNamed(f found) {
	c.unnamed(f, layout.ContainersDir, func(name string) bool {
		return c.exists(layout.ContainerNode(layout.ContainerID(name)))
	})
}

// cacheRecord: K1. An alias may be of a key that was evicted, so there is
// nothing to hold it against but that it has no result of its own.
func (c *checker) cacheRecord(f found) {
	for key, rec := range c.rec.cache {
		object := fmt.Sprintf("cache %q", key)
		for _, s := range rec.Snapshots {
			snap, ok := c.rec.snapshots[s]
			if ok && snap.Kind != layout.SnapshotCommitted || !ok && !c.exists(layout.SnapshotNode(s)) {
				f(object, "", "its result %q is no committed snapshot", s)
			}
		}
		if rec.Alias == key || rec.Alias != "" && len(rec.Snapshots) > 0 {
			f(object, "", "it is an alias of %q and has %d results", rec.Alias, len(rec.Snapshots))
		}
		if uses := c.rec.byUse[key]; len(uses) != 1 || !uses[0].Equal(rec.LastUse) {
			f(object, "", "its places by last use are %v, its record says %v", uses, rec.LastUse)
		}
	}
	for key := range c.rec.byUse {
		if !c.exists(layout.CacheNode(key)) {
			f(fmt.Sprintf("cache %q", key), "", "a place by last use without a record")
		}
	}
}
