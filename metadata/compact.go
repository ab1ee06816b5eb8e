package metadata

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

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
	// touchedBatch is how many of those share a transaction.
	touchedBatch = 2000
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
// free, or a quarter that is many pages, and how large its other pages are: about
// what the file is after [DB.Compact].
func (db *DB) WorthCompacting() (live int64, worth bool, err error) {
	size, free, err := db.Spare()
	worth = size >= compactFrom && (free > size/2 || free > size/4 && free > manyFree)
	return size - free, worth && err == nil, err
}

// Compact writes the database anew, without its free pages, while it is in use.
// Commits wait for its end only, for as long as it takes to copy what few of them
// have changed; whoever reads goes on reading the file as it was. The database is
// looked at first as [DB.Check] does: reading it through bbolt may end the process.
//
// After nil the new file is durable under the database's name; after an error
// the old one is in use. Errors: ErrResourceExhausted; Corrupt, for a database
// that is damaged; ErrUnavailable if one is suspected to be, is being compacted
// already or is being closed; ErrPoisoned if a sync failed; the end of ctx.
func (db *DB) Compact(ctx context.Context) error {
	end, err := db.beginCompacting()
	if err != nil {
		return err
	}
	defer end()
	defer faulting()()
	c := &compaction{db: db, ctx: ctx}
	err = c.run()
	c.end()
	if err != nil {
		return fmt.Errorf("compact the database: %w", err)
	}
	return nil
}

// beginCompacting keeps others from compacting the database or its log, and has
// Close wait, until end is called. Errors: ErrUnavailable, if that is not to be.
func (db *DB) beginCompacting() (end func(), err error) {
	if !db.compacting.TryLock() {
		return nil, fmt.Errorf("the database is being compacted already: %w", errdefs.ErrUnavailable)
	}
	if !db.enlist() {
		db.compacting.Unlock()
		return nil, errClosed
	}
	return func() {
		db.done.Done()
		db.compacting.Unlock()
	}, nil
}

// enlist has Close wait for the caller, until it calls db.done.Done; false if the
// database is being closed.
func (db *DB) enlist() bool {
	db.swap.RLock()
	defer db.swap.RUnlock()
	select {
	case <-db.closing:
		return false
	default:
		db.done.Add(1)
		return true
	}
}

// compaction is one way of a database into another file. It reads in many short
// views and not in one: a commit that maps a longer file waits for whoever reads,
// and until then no page that commits free is used again. What changes between two
// of the views is touched, and copied again.
type compaction struct {
	db     *DB
	ctx    context.Context
	to     *handle
	placed bool // it has the database's name
}

func (c *compaction) run() error {
	if err := c.db.checkOpen(func(int) error { return c.mayGoOn() }); err != nil {
		return err
	}
	if err := c.make(); err != nil {
		return err
	}
	for _, name := range layout.Buckets() {
		if err := c.copyBucket(name); err != nil {
			return err
		}
	}
	for range touchedRounds {
		if more, err := c.catchUp(); err != nil || !more {
			if err != nil {
				return err
			}
			break
		}
	}
	// Most of it is durable before commits wait for the rest.
	if err := c.db.syncCopy(c.to); err != nil {
		return err
	}
	return c.exchange()
}

// mayGoOn is nil until the compaction is called off.
func (c *compaction) mayGoOn() error {
	select {
	case <-c.db.closing:
		return errClosed
	default:
		return c.ctx.Err()
	}
}

// make begins the new file, in place of what an earlier try has left, and has what
// changes from here on noted.
func (c *compaction) make() error {
	size, free, err := c.db.Spare()
	if err != nil {
		return err
	}
	tmp := c.db.root.Path(temporaryDatabase)
	b, file, err := openBoltMapped(tmp, 0, mapSizeOf(size-free), func(f *os.File) error { return f.Truncate(0) })
	if errors.Is(err, ErrLocked) {
		return err // it is somebody else's
	}
	if err != nil {
		return errors.Join(err, c.db.root.Remove(temporaryDatabase))
	}
	b.NoSync = true // until it is whole
	c.to = &handle{bolt: b, file: file}
	c.nextTouched()
	return nil
}

// nextTouched returns what was touched since it was called before.
func (c *compaction) nextTouched() *touched {
	c.db.committing.Lock()
	defer c.db.committing.Unlock()
	was := c.db.touched
	c.db.touched = newTouched()
	return was
}

// end takes back what did not come to be.
func (c *compaction) end() {
	c.db.committing.Lock()
	c.db.touched = nil
	c.db.committing.Unlock()
	if c.to == nil || c.placed {
		return
	}
	_ = c.to.bolt.Close()
	_ = c.db.root.Remove(temporaryDatabase) // or the next opening does
}

// copying runs fn in a transaction of the new file, beside a view of the old one.
func (c *compaction) copying(fn func(from, to *Tx) error) error {
	return c.db.View(context.Background(), func(from *Tx) error {
		err := c.to.bolt.Update(func(btx *bolt.Tx) error { return fn(from, &Tx{bolt: btx}) })
		return openError(c.to.file.Name(), err)
	})
}

// copyBucket copies a bucket in the order of its keys, and adds it up.
func (c *compaction) copyBucket(name string) error {
	last := []byte{} // that was copied
	for last != nil {
		if err := c.mayGoOn(); err != nil {
			return err
		}
		err := c.copying(func(from, to *Tx) (err error) {
			last, err = copyBehind(from.bolt.Bucket([]byte(name)), to.bolt, name, last)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// copyBehind copies the entries that come behind a key, as many as share a
// transaction, and returns the last one's key; nil if there are no more.
func copyBehind(from *bolt.Bucket, to *bolt.Tx, name string, key []byte) (last []byte, err error) {
	into, err := to.CreateBucketIfNotExists([]byte(name))
	if err != nil {
		return nil, err
	}
	into.FillPercent = 0.95 // they come in order
	cursor, sum, n := from.Cursor(), into.Sequence(), 0
	k, v := cursor.Seek(key)
	if k != nil && len(key) > 0 && bytes.Equal(k, key) {
		k, v = cursor.Next()
	}
	for ; k != nil && n < copyBatch; k, v = cursor.Next() {
		if err := into.Put(k, v); err != nil {
			return nil, err
		}
		sum += layout.EntrySum(k, v)
		last = k
		n++
	}
	if k == nil {
		last = nil
	}
	return bytes.Clone(last), into.SetSequence(sum)
}

// catchUp copies what was touched, and tells whether that was more than commits
// can wait for: then there may be as much again.
func (c *compaction) catchUp() (more bool, err error) {
	c.db.committing.Lock()
	few := c.db.touched.len() <= lastTouched
	c.db.committing.Unlock()
	if few {
		return false, nil
	}
	for name, keys := range c.nextTouched().keys {
		for some := range slices.Chunk(slices.Sorted(maps.Keys(keys)), touchedBatch) {
			if err := c.mayGoOn(); err != nil {
				return false, err
			}
			if err := c.copying(func(from, to *Tx) error { return copyAgain(from, to, name, some) }); err != nil {
				return false, err
			}
		}
	}
	return true, nil
}

// copyAgain makes entries what they are in the old file. The sum of the new one's
// bucket follows what is there and what comes.
func copyAgain(from, to *Tx, name string, keys []string) error {
	b := from.bolt.Bucket([]byte(name))
	for _, key := range keys {
		var err error
		if v, ok := lookUp(b, []byte(key)); ok {
			err = to.put(name, []byte(key), v)
		} else {
			err = to.remove(name, []byte(key))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// exchange copies the rest while commits wait, and puts the new file in the place
// of the old one, which is closed when nobody reads it any more.
func (c *compaction) exchange() error {
	db := c.db
	db.committing.Lock()
	defer db.committing.Unlock()
	var number uint64
	err := c.copying(func(from, to *Tx) error {
		for name, keys := range db.touched.keys {
			if err := copyAgain(from, to, name, slices.Sorted(maps.Keys(keys))); err != nil {
				return err
			}
		}
		if err := sameSums(from, to); err != nil {
			return err
		}
		number = uint64(to.bolt.ID())
		state, err := to.states().Get(layout.StateKey)
		if err == nil {
			state.Commit = number
			err = to.states().Put(layout.StateKey, state)
		}
		return err
	})
	if err == nil {
		err = db.syncCopy(c.to)
	}
	if err == nil {
		err = c.place(number)
	}
	return err
}

// sameSums compares every bucket of the copy, added up as it was written, with the
// sum that the original has.
func sameSums(from, to *Tx) error {
	for _, name := range layout.Buckets() {
		want, got := from.bolt.Bucket([]byte(name)).Sequence(), to.bolt.Bucket([]byte(name)).Sequence()
		if want != got {
			return fmt.Errorf("the copy of bucket %s adds up to %016x, not %016x: %w", name, got, want, errdefs.ErrDataLoss)
		}
	}
	return nil
}

// syncCopy makes the new file durable. What a failed sync means for other files of
// the store nobody knows: it is as a commit's.
func (db *DB) syncCopy(to *handle) error {
	if err := to.bolt.Sync(); err != nil {
		db.root.Poison(fmt.Errorf("sync %s: %w", to.file.Name(), bare(err)))
		return db.root.Poisoned()
	}
	return nil
}

// place gives the new file, which is durable, the database's name. The caller holds
// committing.
func (c *compaction) place(number uint64) error {
	db := c.db
	// What is noted of damage has the number of a commit of the file that is
	// in place: see suspect.
	db.noting.Lock()
	defer db.noting.Unlock()
	if err := errors.Join(db.root.Poisoned(), db.broken.get(), db.damage.get(), c.mayGoOn()); err != nil {
		return err
	}
	if stands(db.root, layout.SuspectFile) { // what it says is of the old one
		return fmt.Errorf("it is suspected to be damaged: %w", errdefs.ErrUnavailable)
	}
	durable.At(layout.PointCompactMade)
	err := db.root.Replace(temporaryDatabase, layout.DatabaseFile)
	if err != nil && !hasName(c.to.file, db.path) {
		return err
	}
	// With an error the name may not be durable, and the store is poisoned. The
	// lock that others meet is that on the new file all the same.
	durable.At(layout.PointCompactPublished)
	c.placed = true
	c.to.bolt.NoSync = false
	c.to.committed.Store(number)
	db.swap.Lock()
	old := db.h
	db.h = c.to
	db.swap.Unlock()
	db.done.Go(func() {
		old.users.Wait()
		_ = old.bolt.Close() // nothing was written that is not in the new one
	})
	return err
}
