package gc

import (
	"context"
	"time"

	"varve.dev/layout"
	"varve.dev/metadata"
)

// What there is one by one: its cost grows with the store.

// ImageSpace is what a target of images takes.
type ImageSpace struct {
	Target  layout.BlobDigest
	Names   []string
	Created time.Time
	Bytes   int64 // of everything that it needs
	Unique  int64 // of what no other target needs
	InUse   int   // containers whose tree stands on it
}

// Images returns what each image takes.
func (c *Collector) Images(ctx context.Context) (all []ImageSpace, err error) {
	err = c.DB.View(ctx, func(tx *metadata.Tx) error {
		all = nil
		at := map[layout.BlobDigest]int{}
		err := tx.Images().Each("", func(name string, rec layout.ImageRecord) error {
			target := layout.BlobDigest(rec.Target.Digest)
			i, ok := at[target]
			if !ok {
				i = len(all)
				at[target] = i
				all = append(all, ImageSpace{Target: target, Created: rec.Created})
			}
			all[i].Names = append(all[i].Names, name)
			return nil
		})
		if err != nil {
			return err
		}
		needs := map[layout.Node]int{} // how many images need it
		trees := make([]map[layout.Node]int64, len(all))
		for i, image := range all {
			if trees[i], err = spaceBelow(tx, layout.BlobNode(image.Target)); err != nil {
				return err
			}
			for n := range trees[i] {
				needs[n]++
			}
		}
		tops, err := standing(tx)
		if err != nil {
			return err
		}
		for i := range all {
			for n, bytes := range trees[i] {
				all[i].Bytes += bytes
				if needs[n] == 1 {
					all[i].Unique += bytes
				}
			}
			unpacked, err := unpackedBelow(tx, layout.BlobNode(all[i].Target))
			if err != nil {
				return err
			}
			for _, n := range unpacked {
				all[i].InUse += tops[n]
			}
		}
		return nil
	})
	return all, err
}

// Again returns how many bytes are in blobs that a registry can serve again: see
// [Limits.Retain].
func (c *Collector) Again(ctx context.Context) (bytes int64, err error) {
	layersOf := map[layout.Node]map[layout.BlobDigest]bool{}
	for after, more := layout.BlobDigest(""), true; more && err == nil; {
		var found map[layout.BlobDigest][]layout.Node
		err = c.DB.View(ctx, func(tx *metadata.Tx) (err error) {
			found, after, more, err = repeatable(tx, after, everything)
			return err
		})
		for d, manifests := range found {
			if !c.isLayer(ctx, layersOf, d, manifests) {
				continue
			}
			if info, err := c.Blobs.Info(ctx, d.Digest()); err == nil {
				bytes += layout.OnDisk(info.Size)
			}
		}
	}
	return bytes, err
}

// spaceBelow returns the blobs and layers that a node needs, with their bytes.
func spaceBelow(tx *metadata.Tx, n layout.Node) (map[layout.Node]int64, error) {
	seen, out := map[layout.Node]bool{}, map[layout.Node]int64{}
	todo := []layout.Node{n}
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[n] {
			continue
		}
		seen[n] = true
		switch kind, id := n.Split(); kind {
		case layout.KindBlob:
			if tx.Exists(n) {
				rec, err := tx.Blobs().Get(layout.BlobDigest(id))
				if err != nil {
					return nil, err
				}
				out[n] = layout.BlobUsage(rec).Bytes
			}
		case layout.KindLayer:
			if tx.Exists(n) {
				rec, err := tx.Layers().Get(layout.LayerID(id))
				if err != nil {
					return nil, err
				}
				out[n] = layout.LayerUsage(rec).Bytes
			}
		}
		children, err := tx.Children(n)
		if err != nil {
			return nil, err
		}
		for _, e := range children {
			todo = append(todo, e.Child)
		}
	}
	return out, nil
}

// unpackedBelow returns the snapshots of the manifests below a target.
func unpackedBelow(tx *metadata.Tx, n layout.Node) (out []layout.Node, err error) {
	todo := []layout.Node{n}
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		children, err := tx.Children(n)
		if err != nil {
			return nil, err
		}
		for _, e := range children {
			switch e.Rel {
			case layout.RelUnpacked:
				out = append(out, e.Child)
			case layout.RelContent:
				todo = append(todo, e.Child)
			}
		}
	}
	return out, nil
}

// standing counts the containers by the snapshot that each stands on.
func standing(tx *metadata.Tx) (map[layout.Node]int, error) {
	on := map[layout.Node]int{}
	err := tx.Containers().Each("", func(_ layout.ContainerID, rec layout.ContainerRecord) error {
		snap, err := tx.Snapshots().Get(rec.Snapshot)
		if err == nil && snap.Parent != "" {
			on[layout.SnapshotNode(snap.Parent)]++
		}
		return nil // C1 is fsck's to report
	})
	return on, err
}

// Measured is a directory with its measure.
type Measured struct {
	ID, Name      string
	Bytes, Inodes int64
	When          time.Time // zero: never yet
}

// Containers returns what each container takes: the writable layer with the
// directory.
func (c *Collector) Containers(ctx context.Context) (all []Measured, err error) {
	err = c.DB.View(ctx, func(tx *metadata.Tx) error {
		all = nil
		return tx.Containers().Each("", func(id layout.ContainerID, rec layout.ContainerRecord) error {
			m := Measured{ID: string(id), Name: rec.Name}
			paths := []string{layout.ContainerPath(id)}
			if snap, err := tx.Snapshots().Get(rec.Snapshot); err == nil {
				paths = append(paths, layout.ActivePath(snap.Layer))
			}
			for _, rel := range paths {
				if at, err := tx.Measures().Get(rel); err == nil {
					m.Bytes += at.Bytes
					m.Inodes += at.Inodes
					m.When = at.When
				}
			}
			all = append(all, m)
			return nil
		})
	})
	return all, err
}

// Mounts returns what each cache mount takes.
func (c *Collector) Mounts(ctx context.Context) (all []Measured, err error) {
	err = c.DB.View(ctx, func(tx *metadata.Tx) error {
		all = nil
		prefix := layout.CacheMountPath("") + "/"
		return tx.Measures().Each(prefix, func(rel string, rec layout.MeasureRecord) error {
			all = append(all, Measured{ID: rel[len(prefix):], Bytes: rec.Bytes, Inodes: rec.Inodes, When: rec.When})
			return nil
		})
	})
	return all, err
}

// Result is a build result.
type Result struct {
	Key string
	layout.CacheRecord
	InUse bool // evicting it would free nothing now
}

// Results returns the build results, the least recently used first.
func (c *Collector) Results(ctx context.Context) (all []Result, err error) {
	err = c.DB.View(ctx, func(tx *metadata.Tx) (err error) {
		all = nil
		tx.EachCacheByUse("", time.Time{}, func(key string, _ time.Time) bool {
			rec, gerr := tx.Cache().Get(key)
			if gerr != nil || rec.Alias != "" {
				return true // K1, or no result of its own
			}
			_, free, lerr := look(tx, key)
			if err = lerr; err != nil {
				return false
			}
			all = append(all, Result{key, rec, !free})
			return true
		})
		return err
	})
	return all, err
}
