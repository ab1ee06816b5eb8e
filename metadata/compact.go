package metadata

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	bolt "go.etcd.io/bbolt"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// bbolt gives no page back to the file system: a database that was large once
// stays so. Compacting writes what it holds into another file, which takes its
// place. Commits go on meanwhile; what they touch is copied once more.

const (
	// compactFrom is the size below which a database is not compacted, and
	// manyFree the bytes of free pages that make a commit dear: it writes the
	// list of them.
	compactFrom = 16 << 20
	manyFree    = 10_000 * 4096
	// copyBatch is how many entries share a transaction of the new file.
	copyBatch = 20_000
	// lastTouched is how many entries may be left to copy while commits wait,
	// and touchedRounds how often the copying comes back for more than that.
	lastTouched   = 500
	touchedRounds = 10
)

// touched are the entries that changed while they were copied.
type touched struct{ keys map[string]map[string]bool } // by bucket

func newTouched() *touched { return &touched{map[string]map[string]bool{}} }

func (t *touched) add(bucket string, key []byte) {
	if t == nil {
		return
	}
	if t.keys[bucket] == nil {
		t.keys[bucket] = map[string]bool{}
	}
	t.keys[bucket][string(key)] = true
}

func (t *touched) len() (n int) {
	for _, keys := range t.keys {
		n += len(keys)
	}
	return n
}

// Spare returns the size of the database's file and how much of it is free.
func (db *DB) Spare() (size, free int64, err error) {
	err = db.View(context.Background(), func(tx *Tx) error {
		c := &pageChecker{file: tx.h.file, pageSize: uint64(tx.h.bolt.Info().PageSize)}
		list, err := c.freelistOf(uint64(tx.bolt.ID()))
		if err != nil || list == noFreelist {
			return damaged(db.path, err) // noFreelist: it is changing too fast to say
		}
		c.setHigh(uint64(tx.bolt.Size()) / c.pageSize)
		_, pages, err := c.readFreelist(list)
		size, free = tx.bolt.Size(), int64(pages)*int64(c.pageSize)
		return damaged(db.path, err)
	})
	return size, free, err
}

// WorthCompacting tells whether more than half of a database of some size is
// free, or a quarter that is many pages, and how large what it holds is: about as large as the file is after
// [DB.Compact].
func (db *DB) WorthCompacting() (live int64, worth bool, err error) {
	size, free, err := db.Spare()
	worth = size >= compactFrom && (free > size/2 || free > size/4 && free > manyFree)
	return size - free, worth && err == nil, err
}

// Compact writes the database anew, without its free pages, while it is in use.
// Commits wait for its end only, for as long as it takes to copy what few of them
// have changed; whoever reads goes on reading the file as it was.
//
// After nil the new file is durable under the database's name; after an error
// the old one is in use. Errors: ErrResourceExhausted; Corrupt, for a database
// that is damaged; ErrUnavailable if one is suspected to be, or is being compacted
// already; the end of ctx.
func (db *DB) Compact(ctx context.Context) (err error) {
	if !db.compacting.TryLock() {
		return fmt.Errorf("the database is being compacted already: %w", errdefs.ErrUnavailable)
	}
	defer db.compacting.Unlock()
	tmp := db.root.Path(temporaryDatabase)
	b, file, err := openBolt(tmp, 0, func(f *os.File) error { return f.Truncate(0) })
	if err != nil {
		return fmt.Errorf("compact the database: %w", err)
	}
	b.NoSync = true // until it is whole
	c := &compaction{db: db, to: &handle{bolt: b, file: file}}
	defer func() {
		c.end()
		if err != nil {
			err = errors.Join(fmt.Errorf("compact the database: %w", err), b.Close(), db.root.Remove(temporaryDatabase))
		}
	}()
	defer faulting()()
	if err := protect(func() error { return c.copyAll(ctx) }); err != nil {
		return db.suspect(openError(tmp, err))
	}
	for range touchedRounds {
		more, err := c.catchUp()
		if err != nil {
			return db.suspect(openError(tmp, err))
		}
		if !more {
			break
		}
	}
	return c.exchange()
}

// compaction is one way of a database into another file.
type compaction struct {
	db   *DB
	to   *handle
	from *bolt.Tx // the state that is copied
	left func()
}

// end lets go of the old file.
func (c *compaction) end() {
	c.db.committing.Lock()
	c.db.touched = nil
	c.db.committing.Unlock()
	c.release()
}

func (c *compaction) release() {
	if c.from != nil {
		_ = c.from.Rollback()
		c.left()
		c.from = nil
	}
}

// begin takes the present state, and has what changes from here on noted. The
// caller holds committing.
func (c *compaction) begin() error {
	c.release()
	h, leave := c.db.enter()
	tx, err := h.bolt.Begin(false)
	if err != nil {
		leave()
		return err
	}
	c.from, c.left = tx, leave
	c.db.touched = newTouched()
	return notBefore(tx, h.committed.Load())
}

// copyAll copies every bucket in the order of its keys, and compares it with its
// sum.
func (c *compaction) copyAll(ctx context.Context) error {
	c.db.committing.Lock()
	err := c.begin()
	c.db.committing.Unlock()
	if err != nil {
		return err
	}
	for _, name := range layout.Buckets() {
		if err := c.copyBucket(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

func (c *compaction) copyBucket(ctx context.Context, name string) error {
	from := c.from.Bucket([]byte(name))
	if from == nil {
		return &errdefs.Corrupt{Invariant: "M2", Object: "database " + c.db.path, Detail: "bucket " + name + " is missing"}
	}
	sum := uint64(0)
	cursor := from.Cursor()
	k, v := cursor.First()
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := c.to.bolt.Update(func(tx *bolt.Tx) error {
			to, err := tx.CreateBucketIfNotExists([]byte(name))
			if err != nil {
				return err
			}
			to.FillPercent = 0.95 // they come in order
			for n := 0; k != nil && n < copyBatch; n++ {
				if err := to.Put(k, v); err != nil {
					return err
				}
				sum += layout.EntrySum(k, v)
				k, v = cursor.Next()
			}
			more = k != nil
			return to.SetSequence(from.Sequence())
		})
		if err != nil {
			return err
		}
	}
	if sum != from.Sequence() {
		return &errdefs.Corrupt{Invariant: "M5", Object: "bucket " + name, Detail: fmt.Sprintf("its entries add up to %016x, not %016x", sum, from.Sequence())}
	}
	return nil
}

// catchUp copies what has changed since, and tells whether more has meanwhile
// than commits can wait for.
func (c *compaction) catchUp() (more bool, err error) {
	c.release() // a commit may wait for readers to end, to map a longer file
	c.db.committing.Lock()
	changed := c.db.touched
	if changed.len() <= lastTouched {
		c.db.committing.Unlock()
		return false, nil
	}
	err = c.begin()
	c.db.committing.Unlock()
	if err != nil {
		return false, err
	}
	return true, protect(func() error {
		return c.to.bolt.Update(func(tx *bolt.Tx) error { return c.copyTouched(tx, changed) })
	})
}

// copyTouched makes entries what they are in the state that is copied.
func (c *compaction) copyTouched(to *bolt.Tx, changed *touched) error {
	for name, keys := range changed.keys {
		from, into := c.from.Bucket([]byte(name)), to.Bucket([]byte(name))
		for key := range keys {
			k, v := from.Cursor().Seek([]byte(key))
			var err error
			if k != nil && bytes.Equal(k, []byte(key)) {
				err = into.Put([]byte(key), v)
			} else {
				err = into.Delete([]byte(key))
			}
			if err != nil {
				return err
			}
		}
		if err := into.SetSequence(from.Sequence()); err != nil {
			return err
		}
	}
	return nil
}

// exchange copies the rest while commits wait, and puts the new file in the place
// of the old one, which is closed when nobody reads it any more.
func (c *compaction) exchange() error {
	db := c.db
	c.release()
	db.committing.Lock()
	defer db.committing.Unlock()
	if err := errors.Join(db.root.Poisoned(), db.broken.get(), db.damage.get()); err != nil {
		return err
	}
	if stands(db.root, layout.SuspectFile) { // what it says is of the old one
		return fmt.Errorf("it is suspected to be damaged: %w", errdefs.ErrUnavailable)
	}
	changed := db.touched
	if err := c.begin(); err != nil {
		return err
	}
	var number uint64
	err := protect(func() error {
		return c.to.bolt.Update(func(btx *bolt.Tx) error {
			if err := c.copyTouched(btx, changed); err != nil {
				return err
			}
			tx := &Tx{bolt: btx}
			state, err := tx.states().Get(layout.StateKey)
			number = uint64(btx.ID())
			if err != nil {
				return err
			}
			return tx.mark(state.Change)
		})
	})
	if err == nil {
		err = c.to.bolt.Sync()
	}
	if err != nil {
		return db.suspect(openError(c.to.file.Name(), err))
	}
	durable.At(layout.PointCompactMade)
	if err := db.root.Replace(temporaryDatabase, layout.DatabaseFile); err != nil {
		return err
	}
	durable.At(layout.PointCompactPublished)
	c.to.bolt.NoSync = false
	c.to.committed.Store(number)
	db.swap.Lock()
	old := db.h
	db.h = c.to
	db.swap.Unlock()
	c.release()
	db.done.Go(func() {
		old.users.Wait()
		_ = old.bolt.Close() // nothing was written that is not in the new one
	})
	return nil
}
