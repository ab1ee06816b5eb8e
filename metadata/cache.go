package metadata

import (
	"encoding/binary"
	"errors"
	"time"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Cache returns the build cache's table for reading.
func (tx *Tx) Cache() Table[string, layout.CacheRecord] {
	return table[string, layout.CacheRecord](tx, layout.BucketCache)
}

// useKey orders cache records by last use, the oldest first.
func useKey(key string, last time.Time) []byte {
	out := make([]byte, 8, 8+len(key))
	binary.BigEndian.PutUint64(out, uint64(last.UnixNano()))
	return append(out, key...)
}

// PutCache stores a cache record, its place by last use and its edges to the
// snapshots of its result.
func (tx *Tx) PutCache(key string, rec layout.CacheRecord) error {
	if err := tx.dropUse(key); err != nil {
		return err
	}
	node := layout.CacheNode(key)
	old, err := tx.Children(node)
	if err != nil {
		return err
	}
	rec.Size = 0
	for _, s := range rec.Snapshots {
		if snap, err := tx.Snapshots().Get(s); err == nil {
			rec.Size += snap.Size
		}
		if err := tx.Link(layout.Edge{Parent: node, Rel: layout.RelResult, Child: layout.SnapshotNode(s)}); err != nil {
			return err
		}
	}
	if err := tx.Cache().Put(key, rec); err != nil {
		return err
	}
	for _, e := range old {
		if !holdsSnapshot(rec, e.Child) {
			if err := tx.Unlink(e); err != nil {
				return err
			}
		}
	}
	return tx.put(layout.BucketCacheByUse, useKey(key, rec.LastUse), nil)
}

func holdsSnapshot(rec layout.CacheRecord, n layout.Node) bool {
	for _, s := range rec.Snapshots {
		if layout.SnapshotNode(s) == n {
			return true
		}
	}
	return false
}

// TouchCache sets a record's last use and counts it. One that was evicted
// meanwhile is no error.
func (tx *Tx) TouchCache(key string, now time.Time) error {
	rec, err := tx.Cache().Get(key)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	rec.LastUse = now
	rec.Uses++
	return tx.PutCache(key, rec)
}

// EachCacheByUse calls fn with keys in the order of last use, the oldest
// first, until it returns false. It begins behind the record after with the
// last use since; with "" and the zero time at the beginning.
func (tx *Tx) EachCacheByUse(after string, since time.Time, fn func(key string, last time.Time) bool) {
	c := tx.bolt.Bucket([]byte(layout.BucketCacheByUse)).Cursor()
	from := []byte{}
	if after != "" {
		from = append(useKey(after, since), 0)
	}
	for k, _ := c.Seek(from); k != nil; k, _ = c.Next() {
		if len(k) < 8 {
			continue // fsck reports it as M3
		}
		if !fn(string(k[8:]), time.Unix(0, int64(binary.BigEndian.Uint64(k)))) {
			return
		}
	}
}

func (tx *Tx) dropUse(key string) error {
	rec, err := tx.Cache().Get(key)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return tx.remove(layout.BucketCacheByUse, useKey(key, rec.LastUse))
}

func (tx *Tx) eraseCache(key string) error {
	if err := tx.dropUse(key); err != nil {
		return err
	}
	return tx.Cache().Delete(key)
}
