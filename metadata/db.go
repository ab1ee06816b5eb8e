package metadata

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// ErrLocked says that another process has the store open.
var ErrLocked = fmt.Errorf("the store is open in another process: %w", errdefs.ErrUnavailable)

// DB is the open database of one store. One process at a time has it open.
type DB struct {
	root    *durable.Root
	bolt    *bolt.DB
	meta    layout.MetaRecord
	queue   chan *update
	closing chan struct{}
	done    sync.WaitGroup
	commits commitCounter
}

// Options for [Open].
type Options struct {
	// LockTimeout bounds the wait for another process to close the
	// database; zero means do not wait.
	LockTimeout time.Duration
}

// shortestLockWait is the least bbolt understands: it takes zero for "wait
// for ever".
const shortestLockWait = time.Millisecond

// temporaryDatabase is the name under which a database is made.
const temporaryDatabase = durable.TempPrefix + layout.DatabaseFile

// Open opens the database in root, making it first if the store is new.
// Errors: [ErrLocked]; Corrupt (M1 to M3) for a damaged one;
// ErrFailedPrecondition for a format that this code does not know.
func Open(root *durable.Root, opts Options) (*DB, error) {
	if _, err := os.Lstat(root.Path(layout.DatabaseFile)); errors.Is(err, fs.ErrNotExist) {
		if err := create(root); err != nil {
			return nil, err
		}
	}
	b, err := openBolt(root.Path(layout.DatabaseFile), max(opts.LockTimeout, shortestLockWait))
	if err != nil {
		return nil, err
	}
	db := &DB{root: root, bolt: b, queue: make(chan *update), closing: make(chan struct{})}
	if err := db.check(); err != nil {
		b.Close()
		return nil, err
	}
	db.done.Add(1)
	go db.commitLoop()
	return db, nil
}

// openBolt opens the file with the settings that every open of it must share.
func openBolt(path string, wait time.Duration) (b *bolt.DB, err error) {
	defer catch(&err)
	defer faulting()()
	b, err = bolt.Open(path, 0o600, &bolt.Options{
		Timeout: wait,
		// The map keeps the free list at O(log n) for large databases;
		// it is synced, so that opening one need not scan every page.
		FreelistType: bolt.FreelistMapType,
	})
	switch {
	case err == nil:
		return b, nil
	case errors.Is(err, bolt.ErrTimeout):
		return nil, fmt.Errorf("%s: %w", path, ErrLocked)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("open database: %w: %w", err, errdefs.ErrUnavailable)
	}
	return nil, &errdefs.Corrupt{Invariant: "M2", Object: path, Detail: err.Error()}
}

// create makes a database under a temporary name and publishes it, so that
// what stands at the final name always has every bucket.
func create(root *durable.Root) error {
	// Two processes may come here at once; the lock on the temporary file
	// lets one of them make it.
	tmp := root.Path(temporaryDatabase)
	b, err := openBolt(tmp, 30*time.Second)
	if err != nil {
		return fmt.Errorf("create database: %w", err)
	}
	defer b.Close()
	if _, err := os.Lstat(root.Path(layout.DatabaseFile)); err == nil {
		return nil // the other one was faster
	}
	err = b.Update(func(tx *bolt.Tx) error {
		for _, name := range layout.Buckets() {
			if _, err := tx.CreateBucketIfNotExists([]byte(name)); err != nil {
				return err
			}
		}
		meta := layout.MetaRecord{Format: layout.FormatVersion, ID: layout.NewID(), Created: time.Now().UTC()}
		value, err := layout.Encode(layout.MetaKey, meta)
		if err != nil {
			return err
		}
		return tx.Bucket([]byte(layout.BucketMeta)).Put([]byte(layout.MetaKey), value)
	})
	if err != nil {
		return fmt.Errorf("create database %s: %w: %w", tmp, err, kindOf(err))
	}
	durable.At(layout.PointCreateDatabase)
	if err := root.Publish(temporaryDatabase, layout.DatabaseFile); err != nil && !errors.Is(err, errdefs.ErrAlreadyExists) {
		return fmt.Errorf("create database: %w", err)
	}
	durable.At(layout.PointCreatePublished)
	return nil
}

// check is the bounded look at a database that is being opened: the buckets
// and the store record, whatever the number of records.
func (db *DB) check() error {
	return db.View(context.Background(), func(tx *Tx) error {
		for _, name := range layout.Buckets() {
			if tx.bolt.Bucket([]byte(name)) == nil {
				return &errdefs.Corrupt{Invariant: "M2", Object: "database " + db.bolt.Path(), Detail: "bucket " + name + " is missing"}
			}
		}
		meta, err := table[string, layout.MetaRecord](tx, layout.BucketMeta).Get(layout.MetaKey)
		if err != nil {
			return &errdefs.Corrupt{Invariant: "M2", Object: "database " + db.bolt.Path(), Detail: err.Error()}
		}
		if meta.Format != layout.FormatVersion {
			return fmt.Errorf("store %s has format %d, this varve knows format %d: %w",
				db.root.Path("."), meta.Format, layout.FormatVersion, errdefs.ErrFailedPrecondition)
		}
		db.meta = meta
		return nil
	})
}

// Meta returns the store's own record.
func (db *DB) Meta() layout.MetaRecord { return db.meta }

// Close waits for updates under way and closes the database. Later updates
// fail with ErrUnavailable.
func (db *DB) Close() error {
	close(db.closing)
	db.done.Wait()
	return db.bolt.Close()
}

// View runs fn in a read-only transaction on the last committed state. What
// fn gets from the transaction is its own to keep.
func (db *DB) View(ctx context.Context, fn func(*Tx) error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	defer catch(&err)
	defer faulting()()
	return db.bolt.View(func(tx *bolt.Tx) error { return fn(&Tx{bolt: tx}) })
}

// catch turns a panic or memory fault from damaged pages into Corrupt. Faults
// of the memory map become panics only in goroutines that asked for it with
// faulting.
//
// A bug in a transaction's own function looks the same and is reported the
// same: bbolt panics with plain text on a bad page, so the two cannot be told
// apart, and a daemon that stays up is worth more than a clean trace. The
// stack is in the finding.
func catch(err *error) {
	if r := recover(); r != nil {
		*err = &errdefs.Corrupt{Invariant: "M1", Object: "database", Detail: fmt.Sprintf("%v\n%s", r, debug.Stack())}
	}
}

// faulting makes memory faults of this goroutine panics until the returned
// function runs.
func faulting() func() {
	old := debug.SetPanicOnFault(true)
	return func() { debug.SetPanicOnFault(old) }
}

// kindOf gives an error from bbolt or from an update the kind it crosses the
// package with.
func kindOf(err error) error {
	if errdefs.AsCorrupt(err) != nil {
		return errdefs.ErrDataLoss
	}
	if errors.Is(err, bolt.ErrDatabaseNotOpen) {
		return errdefs.ErrUnavailable
	}
	return errdefs.ErrUnknown
}

// ForCheck returns the open bbolt database, for package fsck to read while the
// store is in use.
func (db *DB) ForCheck() *bolt.DB { return db.bolt }
