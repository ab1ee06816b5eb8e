package metadata

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// What a repair sets right in the database. Damage of the file itself is not
// among it: that is what a database is made anew for.

// Unused queues the files at path for the trash, unless something names them by
// now: n, or an open intent. It tells whether it did.
func (tx *Tx) Unused(n layout.Node, path string) (bool, error) {
	named := tx.Exists(n)
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
	return true, tx.Sweep(n, path)
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
		err = errors.Join(err, remove(uses, k))
	}
	return errors.Join(err, tx.Drop(layout.CacheNode(key)))
}

// FixEdge makes an edge whole: in both directions if both its ends exist, else
// in none.
func (tx *Tx) FixEdge(e layout.Edge) error {
	switch {
	case tx.Exists(e.Parent) && tx.Exists(e.Child):
		return tx.Link(e)
	case !tx.Exists(e.Parent):
		return tx.Unlink(e)
	}
	return fmt.Errorf("%s is needed by %s and is not there: %w", e.Child, e.Parent, errdefs.ErrNotFound)
}
