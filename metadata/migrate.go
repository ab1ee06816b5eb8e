package metadata

import (
	"errors"
	"fmt"

	bolt "go.etcd.io/bbolt"

	"varve.dev/layout"
)

// How the database of an older store becomes one of this format, when it is opened.

// The formats before layout.FormatVersion.
const (
	// The sequence of its bucket meta is the number of the last change, the
	// others have none.
	formatWithoutSums = 1
	// It has neither accounts nor the buckets that came with them.
	formatWithoutAccounts = 2
)

var addedWithAccounts = []string{layout.BucketUses, layout.BucketMeasures}

// migrate makes the database of an older store one of this format.
func (db *DB) migrate() error {
	defer faulting()()
	was := db.meta.Format
	err := db.guard(func() error { return db.h.bolt.Update(db.upgrade) })
	if err != nil {
		return fmt.Errorf("store %s, from format %d to %d: %w", db.root.Path("."), was, layout.FormatVersion, db.commitFailed(err))
	}
	return nil
}

func (db *DB) upgrade(btx *bolt.Tx) error {
	tx := &Tx{bolt: btx}
	last := btx.Bucket([]byte(layout.BucketMeta)).Sequence()
	if db.meta.Format == formatWithoutSums {
		if err := addSums(btx); err != nil {
			return err
		}
	} else {
		var err error
		if last, err = tx.lastChange(); err != nil {
			return err
		}
	}
	for _, name := range addedWithAccounts {
		if _, err := btx.CreateBucketIfNotExists([]byte(name)); err != nil {
			return err
		}
	}
	if err := errors.Join(tx.renameSweeps(), tx.Recount()); err != nil {
		return err
	}
	meta := db.meta
	meta.Format = layout.FormatVersion
	if err := tx.metas().Put(layout.MetaKey, meta); err != nil {
		return err
	}
	db.meta = meta
	return tx.mark(last)
}

// renameSweeps gives the sweeps of blobs the ids by which they are found. What
// stands in the trash by an old one is emptied out of it by recovery.
func (tx *Tx) renameSweeps() error {
	old := map[string]layout.SweepRecord{}
	err := tx.Sweeps().Each("", func(id string, s layout.SweepRecord) error {
		if layout.SweepPrefix(s.Node) != "" {
			old[id] = s
		}
		return nil
	})
	for id, s := range old {
		err = errors.Join(err, tx.Sweeps().Delete(id), tx.Sweeps().Put(layout.NewSweepID(s.Node), s))
	}
	return err
}

// addSums gives every bucket its sum.
func addSums(btx *bolt.Tx) error {
	return btx.ForEach(func(_ []byte, b *bolt.Bucket) error {
		sum := uint64(0)
		err := b.ForEach(func(k, v []byte) error {
			sum += layout.EntrySum(k, v)
			return nil
		})
		if err == nil {
			err = b.SetSequence(sum)
		}
		return err
	})
}
