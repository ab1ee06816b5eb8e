package metadata

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// lockInterval is how often a held lock is tried again. bbolt's own 50 ms
// would show each time the store changes hands.
const lockInterval = 2 * time.Millisecond

// openLocked opens the file at path, making it if need be, locks it against
// other processes, and gives it to ready before anybody reads it. ErrLocked if
// the lock is not to be had within wait.
func openLocked(path string, wait time.Duration, ready func(*os.File) error) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(wait)
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
		if !time.Now().Before(deadline) {
			err = fmt.Errorf("%s: %w", path, ErrLocked)
			break
		}
		time.Sleep(lockInterval)
	}
	if err == nil {
		err = ready(f)
	}
	if err != nil {
		unlock(f)
		return nil, err
	}
	return f, nil
}

// unlock lets go of the lock and the file. The lock is taken off by name: a
// memory map that bbolt leaves behind when it panics would keep it.
func unlock(f *os.File) {
	_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
	_ = f.Close()
}

// openBolt opens the file with the settings that every open of it must share.
func openBolt(path string, wait time.Duration, ready func(*os.File) error) (b *bolt.DB, file *os.File, err error) {
	defer func() {
		if err != nil && file != nil {
			unlock(file)
		}
	}()
	defer catch(&err)
	defer faulting()()
	b, err = bolt.Open(path, 0o600, &bolt.Options{
		Timeout: time.Second, // the lock is ours already
		OpenFile: func(string, int, os.FileMode) (*os.File, error) {
			f, err := openLocked(path, wait, ready)
			file = f
			return f, err
		},
		// The map keeps the free list at O(log n) for large databases;
		// it is synced, so that opening one need not scan every page.
		FreelistType: bolt.FreelistMapType,
		// Counting costs every transaction a lock that all share.
		NoStatistics: true,
	})
	return b, file, openError(path, err)
}

// openError gives what came of opening a database its kind.
func openError(path string, err error) error {
	switch {
	case err == nil, errdefs.Has(err):
		return err
	case noSpace(err):
		return fmt.Errorf("open database %s: %w: %w", path, err, errdefs.ErrResourceExhausted)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		return &errdefs.Corrupt{Invariant: "M2", Object: "database " + path, Detail: err.Error()}
	}
	return fmt.Errorf("open database %s: %w: %w", path, err, errdefs.ErrUnavailable)
}

// errMade ends a creation that another process has done meanwhile.
var errMade = fmt.Errorf("the database has been made: %w", errdefs.ErrAlreadyExists)

// createWait bounds the wait for another process that makes the same database.
const createWait = 30 * time.Second

// create makes a database under a temporary name and publishes it, so that
// what stands at the final name always has every bucket. It returns it open:
// the lock is on the file, not on the name, and nobody gets in between. If
// another process is faster, the error is errMade.
func create(root *durable.Root) (*bolt.DB, *os.File, error) {
	// Whoever gets the lock on the temporary file makes the database. What
	// a crash has left of an earlier try is worth nothing.
	tmp := root.Path(temporaryDatabase)
	var b *bolt.DB
	var file *os.File
	var err error
	for deadline := time.Now().Add(createWait); ; time.Sleep(lockInterval) {
		if made(root) {
			return nil, nil, errors.Join(errMade, root.Remove(temporaryDatabase))
		}
		b, file, err = openBolt(tmp, 0, func(f *os.File) error {
			if made(root) {
				return errMade
			}
			return f.Truncate(0)
		})
		if err == nil {
			break
		}
		if retry := errors.Is(err, errMade) || errors.Is(err, ErrLocked); !retry || time.Now().After(deadline) {
			return nil, nil, fmt.Errorf("create database: %w", err)
		}
	}
	if err := publish(root, b); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("create database: %w", err), b.Close())
	}
	return b, file, nil
}

// made tells whether the database has its name.
func made(root *durable.Root) bool {
	_, err := os.Lstat(root.Path(layout.DatabaseFile))
	return !errors.Is(err, fs.ErrNotExist)
}

// publish fills the new database and gives it its name.
func publish(root *durable.Root, b *bolt.DB) error {
	if err := b.Update(fill); err != nil {
		return openError(b.Path(), err)
	}
	durable.At(layout.PointCreateDatabase)
	if err := root.Publish(temporaryDatabase, layout.DatabaseFile); err != nil {
		return err
	}
	durable.At(layout.PointCreatePublished)
	return nil
}

// fill makes the buckets and the store's own record.
func fill(tx *bolt.Tx) error {
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
}

// check is the bounded look at a database that is being opened: the buckets
// and the store record, whatever the number of records.
func (db *DB) check() error {
	return db.View(context.Background(), func(tx *Tx) error {
		for _, name := range layout.Buckets() {
			if tx.bolt.Bucket([]byte(name)) == nil {
				return &errdefs.Corrupt{Invariant: "M2", Object: "database " + db.path, Detail: "bucket " + name + " is missing"}
			}
		}
		meta, err := table[string, layout.MetaRecord](tx, layout.BucketMeta).Get(layout.MetaKey)
		if err != nil {
			return &errdefs.Corrupt{Invariant: "M2", Object: "database " + db.path, Detail: err.Error()}
		}
		if meta.Format != layout.FormatVersion {
			return fmt.Errorf("store %s has format %d, this varve knows format %d: %w",
				db.root.Path("."), meta.Format, layout.FormatVersion, errdefs.ErrFailedPrecondition)
		}
		db.meta = meta
		return nil
	})
}
