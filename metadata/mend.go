package metadata

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// What a repair sets right in the database. Damage of the file itself is not
// among it: that is what a database is made anew for.

// Unused queues the files at path for the trash, unless something names them by
// now: the record of n, what refers to n, or an open intent. It tells whether
// it did.
func (tx *Tx) Unused(n layout.Node, path string) (bool, error) {
	named := tx.Exists(n) || tx.Referenced(n)
	err := tx.Intents().Each("", func(_ layout.IntentID, in layout.IntentRecord) error {
		for _, m := range in.Blobs {
			named = named || layout.BlobPath(m.Digest) == path
		}
		for _, m := range in.Layers {
			named = named || layout.LayerPath(m.ID) == path
		}
		return nil
	})
	if err != nil || named {
		return false, err
	}
	return true, tx.Sweep(n, path, layout.Usage{})
}

// LoggedRecords returns the records that the change log tells of, by bucket and
// key; nil if it cannot be read to its end, or does not have the last of them.
func (db *DB) LoggedRecords() map[string]map[string]json.RawMessage {
	r := newRebuilder(db.root)
	if r.readLog(); len(r.report.Lost) > 0 || r.store != db.meta.ID || !db.log.complete() {
		return nil
	}
	return r.state
}

// PutLogged stores a record of n as a change log has it.
func (tx *Tx) PutLogged(n layout.Node, value json.RawMessage) error {
	kind, id := n.Split()
	switch kind {
	case layout.KindLayer:
		var rec layout.LayerRecord
		if err := json.Unmarshal(value, &rec); err != nil {
			return fmt.Errorf("%s: %w: %w", n, err, errdefs.ErrDataLoss)
		}
		return tx.PutLayer(layout.LayerID(id), rec)
	case layout.KindCache:
		var rec layout.CacheRecord
		if err := json.Unmarshal(value, &rec); err != nil {
			return fmt.Errorf("%s: %w: %w", n, err, errdefs.ErrDataLoss)
		}
		return tx.PutCache(id, rec)
	}
	return table[string, json.RawMessage](tx, recordBuckets[kind]).Put(id, value)
}

// KeyOfLayer returns the key under which the index names a layer; "" if it does
// under none.
func (tx *Tx) KeyOfLayer(id layout.LayerID) (key string, err error) {
	return key, tx.layerKeys().Each("", func(k string, ids layout.LayerIDs) error {
		if slices.Contains(ids, id) {
			key = k
		}
		return nil
	})
}

// FixLayerKey makes a key lead only to layers that have it. Those that lack
// theirs get it by PutLayer.
func (tx *Tx) FixLayerKey(key string) error {
	ids, err := tx.layersOf(key)
	if err != nil {
		return err
	}
	return tx.nameLayers(key, slices.DeleteFunc(ids, func(id layout.LayerID) bool {
		rec, err := tx.Layers().Get(id)
		return errors.Is(err, errdefs.ErrNotFound) || err == nil && rec.Key() != key
	}))
}

// DropCache removes a cache record with all its places by last use, those that
// its record does not know included.
func (tx *Tx) DropCache(key string) error {
	uses := tx.bolt.Bucket([]byte(layout.BucketCacheByUse))
	var places [][]byte
	err := uses.ForEach(func(k, _ []byte) error {
		if len(k) >= 8 && bytes.Equal(k[8:], []byte(key)) {
			places = append(places, bytes.Clone(k))
		}
		return nil
	})
	for _, k := range places {
		err = errors.Join(err, tx.remove(layout.BucketCacheByUse, k))
	}
	return errors.Join(err, tx.Drop(layout.CacheNode(key)))
}

// FixEdge makes an edge whole, in both directions, if both its ends exist, and
// drops it if its parent does not, or has a record that does not call for it.
// What that record does call for is linked before: what is dropped must not
// take with it what only a lost edge held. Errors: ErrNotFound for a child that
// is needed and not there.
func (tx *Tx) FixEdge(e layout.Edge) error {
	if !tx.Exists(e.Parent) {
		if e.Rel == layout.RelRootfs {
			return fmt.Errorf("%s holds what a container has written, and is not recorded: %w", e.Parent, errdefs.ErrNotFound)
		}
		return tx.Unlink(e)
	}
	called, err := tx.calledFor(e.Parent)
	if err != nil {
		return err
	}
	for _, c := range called {
		// The directory of a writable layer exists by being referred to.
		if kind, _ := c.Child.Split(); kind == layout.KindActive || tx.Exists(c.Child) {
			err = errors.Join(err, tx.Link(c))
		}
	}
	switch {
	case err != nil:
		return err
	case layout.RecordTells(e.Rel) && !slices.Contains(called, e):
		return tx.Unlink(e)
	case tx.Exists(e.Child):
		return tx.Link(e)
	}
	return fmt.Errorf("%s is needed by %s and is not there: %w", e.Child, e.Parent, errdefs.ErrNotFound)
}

// calledFor returns the edges that the record of a node calls for by itself.
func (tx *Tx) calledFor(n layout.Node) (edges []layout.Edge, err error) {
	needs := func(rel string, child layout.Node) {
		edges = append(edges, layout.Edge{Parent: n, Rel: rel, Child: child})
	}
	switch kind, id := n.Split(); kind {
	case layout.KindSnapshot:
		rec, err := tx.Snapshots().Get(layout.SnapshotKey(id))
		if err != nil {
			return nil, err
		}
		if rec.Parent != "" {
			needs(layout.RelParent, layout.SnapshotNode(rec.Parent))
		}
		switch {
		case rec.Kind == layout.SnapshotCommitted:
			needs(layout.RelTree, layout.LayerNode(rec.Layer))
		case rec.Layer != "":
			needs(layout.RelTree, layout.ActiveNode(rec.Layer))
		}
	case layout.KindLayer:
		rec, err := tx.Layers().Get(layout.LayerID(id))
		if err != nil {
			return nil, err
		}
		needs(layout.RelFiles, layout.BlobNode(rec.Manifest))
	case layout.KindImage:
		rec, err := tx.Images().Get(id)
		if err != nil {
			return nil, err
		}
		needs(layout.RelTarget, layout.BlobNode(layout.BlobDigest(rec.Target.Digest)))
	case layout.KindContainer:
		rec, err := tx.Containers().Get(layout.ContainerID(id))
		if err != nil {
			return nil, err
		}
		needs(layout.RelRootfs, layout.SnapshotNode(rec.Snapshot))
	case layout.KindCache:
		rec, err := tx.Cache().Get(id)
		if err != nil {
			return nil, err
		}
		for _, s := range rec.Snapshots {
			needs(layout.RelResult, layout.SnapshotNode(s))
		}
	}
	return edges, nil
}
