package metadata

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Apply writes the records and edges of an intent whose files all stand in
// their places, and drops the intent. Carrying it out again changes nothing.
//
// What another publication has recorded meanwhile stays as it is: a blob is
// the same bytes, a layer key keeps the tree it has, and this intent's copy of
// the tree is swept.
func (tx *Tx) Apply(id layout.IntentID, in layout.IntentRecord) error {
	twins, err := tx.applyLayers(in.Layers)
	if err != nil {
		return err
	}
	steps := []func() error{
		func() error { return tx.applyBlobs(in.Blobs) },
		func() error { return tx.applySnapshots(in, twins) },
		func() error { return tx.linkAll(in.Edges) },
		func() error { return tx.applyCache(in.Cache) },
		func() error { return tx.applyImages(in.Images) },
		func() error { return tx.letGo(id, in) },
		func() error { return tx.collectUnused(in) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("intent %s (%s): %w", id, in.Purpose, err)
		}
	}
	return nil
}

func (tx *Tx) applyBlobs(moves []layout.BlobMove) error {
	for _, m := range moves {
		rec := m.Record
		if old, err := tx.Blobs().Get(m.Digest); err == nil {
			rec = mergeBlob(old, rec)
		} else if !errors.Is(err, errdefs.ErrNotFound) {
			return err
		}
		if err := tx.Blobs().Put(m.Digest, rec); err != nil {
			return err
		}
	}
	return nil
}

// maxOrigins bounds the places that a blob's record remembers.
const maxOrigins = 8

// AddOrigin notes that a repository has a blob. Errors: ErrNotFound.
func (tx *Tx) AddOrigin(d layout.BlobDigest, repository string) error {
	rec, err := tx.Blobs().Get(d)
	if err != nil {
		return err
	}
	return tx.Blobs().Put(d, mergeBlob(rec, layout.BlobRecord{Origins: []string{repository}}))
}

// mergeBlob keeps what is known of a blob and adds what is new.
func mergeBlob(old, new layout.BlobRecord) layout.BlobRecord {
	for _, o := range new.Origins {
		old.Origins = append(slices.DeleteFunc(old.Origins, func(s string) bool { return s == o }), o)
	}
	if extra := len(old.Origins) - maxOrigins; extra > 0 {
		old.Origins = old.Origins[extra:]
	}
	if len(new.Labels) > 0 {
		labels := maps.Clone(new.Labels)
		maps.Copy(labels, old.Labels)
		old.Labels = labels
	}
	return old
}

// applyLayers records the trees and returns, for each that another tree with
// the same key has forestalled, that other tree.
func (tx *Tx) applyLayers(moves []layout.LayerMove) (map[layout.LayerID]layout.LayerID, error) {
	twins := map[layout.LayerID]layout.LayerID{}
	for _, m := range moves {
		if key := m.Record.Key(); key != "" {
			other, _, err := tx.LayerByKey(key)
			if err == nil && other != m.ID {
				twins[m.ID] = other
				if err := tx.Sweep(layout.LayerNode(m.ID), layout.LayerPath(m.ID), layout.LayerUsage(m.Record)); err != nil {
					return nil, err
				}
				continue
			}
			if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
				return nil, err
			}
		}
		if err := tx.PutLayer(m.ID, m.Record); err != nil {
			return nil, err
		}
		if err := tx.Link(layout.Edge{
			Parent: layout.LayerNode(m.ID), Rel: layout.RelFiles, Child: layout.BlobNode(m.Record.Manifest),
		}); err != nil {
			return nil, err
		}
	}
	return twins, nil
}

func (tx *Tx) applySnapshots(in layout.IntentRecord, twins map[layout.LayerID]layout.LayerID) error {
	for _, key := range in.Gone {
		if err := tx.forgetActive(key); err != nil {
			return err
		}
	}
	for _, m := range in.Snapshots {
		if tx.Snapshots().Has(m.Key) {
			continue
		}
		rec := m.Record
		if twin, ok := twins[rec.Layer]; ok {
			rec.Layer = twin
		}
		if err := tx.PutSnapshot(m.Key, rec); err != nil {
			return err
		}
	}
	return nil
}

// PutSnapshot stores a snapshot's record with its edges to parent and tree.
func (tx *Tx) PutSnapshot(key layout.SnapshotKey, rec layout.SnapshotRecord) error {
	if err := tx.Snapshots().Put(key, rec); err != nil {
		return err
	}
	if rec.Parent != "" {
		if err := tx.Link(layout.Edge{
			Parent: layout.SnapshotNode(key), Rel: layout.RelParent, Child: layout.SnapshotNode(rec.Parent),
		}); err != nil {
			return err
		}
	}
	if rec.Layer == "" {
		return nil // a view shows its parent
	}
	tree := layout.LayerNode(rec.Layer)
	if rec.Kind != layout.SnapshotCommitted {
		tree = layout.ActiveNode(rec.Layer)
	}
	return tx.Link(layout.Edge{Parent: layout.SnapshotNode(key), Rel: layout.RelTree, Child: tree})
}

// forgetActive removes the record of an active snapshot whose directory has
// become a layer, with no sweep for it.
func (tx *Tx) forgetActive(key layout.SnapshotKey) error {
	node := layout.SnapshotNode(key)
	for _, list := range []func(layout.Node) ([]layout.Edge, error){tx.Children, tx.Parents} {
		edges, err := list(node)
		if err != nil {
			return err
		}
		for _, e := range edges {
			// The parent chain lives on in the committed snapshot, so
			// nothing is collected here.
			if err := tx.cut(e); err != nil {
				return err
			}
		}
	}
	return tx.Snapshots().Delete(key)
}

// letGo drops the intent. The directories of writable layers that it took over
// have become layers, and are not swept.
func (tx *Tx) letGo(id layout.IntentID, in layout.IntentRecord) error {
	node := layout.IntentNode(id)
	for _, m := range in.Layers {
		if taken, ok := m.Taken(); ok {
			if err := tx.Measures().Delete(m.From); err != nil {
				return err
			}
			if err := tx.cut(layout.Edge{Parent: node, Rel: layout.RelHolds, Child: taken}); err != nil {
				return err
			}
		}
	}
	return tx.Drop(node)
}

// linkAll stores edges. Whoever was to hold something may be gone by the time
// that an intent is carried out: the lease of a command that failed.
func (tx *Tx) linkAll(edges []layout.Edge) error {
	for _, e := range edges {
		if !tx.Exists(e.Parent) {
			continue
		}
		if err := tx.Link(e); err != nil {
			return err
		}
	}
	return nil
}

func (tx *Tx) applyCache(makes []layout.CacheMake) error {
	for _, m := range makes {
		if err := tx.PutCache(m.Key, m.Record); err != nil {
			return err
		}
	}
	return nil
}

func (tx *Tx) applyImages(makes []layout.ImageMake) error {
	for _, m := range makes {
		if err := tx.PutImage(m.Name, m.Record); err != nil {
			return err
		}
	}
	return nil
}

// PutImage gives a name to a target, in place of what had it; what only the
// old target held goes.
func (tx *Tx) PutImage(name string, rec layout.ImageRecord) error {
	target := func(r layout.ImageRecord) layout.Edge {
		return layout.Edge{
			Parent: layout.ImageNode(name), Rel: layout.RelTarget,
			Child: layout.BlobNode(layout.BlobDigest(r.Target.Digest)),
		}
	}
	if err := tx.Link(target(rec)); err != nil {
		return err
	}
	old, err := tx.Images().Get(name)
	switch {
	case err == nil:
		rec.Created = old.Created
		if old.Target.Digest != rec.Target.Digest {
			if err := tx.Unlink(target(old)); err != nil {
				return err
			}
		}
	case !errors.Is(err, errdefs.ErrNotFound):
		return err
	}
	return tx.Images().Put(name, rec)
}

// collectUnused drops what the intent brought and nothing needs: the file
// manifest of a tree that had a twin, for example.
func (tx *Tx) collectUnused(in layout.IntentRecord) error {
	for _, m := range in.Snapshots {
		if err := tx.Collect(layout.SnapshotNode(m.Key)); err != nil {
			return err
		}
	}
	for _, m := range in.Layers {
		if !tx.Layers().Has(m.ID) {
			continue
		}
		if err := tx.Collect(layout.LayerNode(m.ID)); err != nil {
			return err
		}
	}
	for _, m := range in.Blobs {
		if !tx.Blobs().Has(m.Digest) {
			continue
		}
		if err := tx.Collect(layout.BlobNode(m.Digest)); err != nil {
			return err
		}
	}
	return nil
}
