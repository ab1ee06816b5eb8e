package metadata

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
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

// firstLength is how long a database is at least, most of it a hole at first: it
// has room for an image of twenty layers.
const firstLength = 256 << 10

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
		// The file is as long as the map, and each time that it grows is a
		// flush more for the commit that needs it.
		InitialMmapSize: firstLength,
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

// checkRecords compares every value with its checksum, and the two halves of
// every edge. A large database is looked at like this only if something in it
// was found damaged before.
func (db *DB) checkRecords() error {
	suspected := stands(db.root, layout.SuspectFile)
	if fi, err := db.file.Stat(); err != nil || !suspected && fi.Size() > maxPagesRead*int64(os.Getpagesize()) {
		return err
	}
	err := db.View(context.Background(), func(tx *Tx) error {
		keysOnly := []string{layout.BucketEdges, layout.BucketEdgesBack, layout.BucketCacheByUse}
		for _, name := range layout.Buckets() {
			if slices.Contains(keysOnly, name) {
				continue
			}
			err := tx.bolt.Bucket([]byte(name)).ForEach(func(k, v []byte) error { return layout.CheckSum(name, string(k), v) })
			if err != nil {
				return err
			}
		}
		return errors.Join(
			tx.checkHalves(layout.BucketEdges, layout.ParseEdge, layout.BucketEdgesBack, layout.Edge.BackKey),
			tx.checkHalves(layout.BucketEdgesBack, layout.ParseBackEdge, layout.BucketEdges, layout.Edge.Key),
		)
	})
	if err == nil && suspected {
		err = db.root.Remove(layout.SuspectFile)
	}
	return err
}

func (tx *Tx) checkHalves(bucket string, parse func([]byte) (layout.Edge, error), other string, key func(layout.Edge) []byte) error {
	halves := tx.bolt.Bucket([]byte(other))
	return tx.bolt.Bucket([]byte(bucket)).ForEach(func(k, _ []byte) error {
		e, err := parse(k)
		if err == nil && halves.Get(key(e)) == nil {
			err = fmt.Errorf("edge %q stands in %s alone", k, bucket)
		}
		if err != nil {
			return &errdefs.Corrupt{Invariant: "M3", Object: "bucket " + bucket, Detail: err.Error()}
		}
		return nil
	})
}

// suspect leaves a note for the next opening if err is damage of the database,
// and returns err.
func (db *DB) suspect(err error) error {
	if c := errdefs.AsCorrupt(err); c != nil && strings.HasPrefix(c.Invariant, "M") && !stands(db.root, layout.SuspectFile) {
		// The store may be poisoned, or the disk full: then the next
		// opening has to find it by itself.
		_ = db.root.WriteFile(layout.SuspectFile, []byte(c.Error()+"\n"), 0o600)
	}
	return err
}

// stands tells whether the store has a file of this name.
func stands(root *durable.Root, name string) bool {
	_, err := os.Lstat(root.Path(name))
	return err == nil
}

// neverMade refuses to make a database for a store that had one: its log is
// there, or what only a database can have led to.
func neverMade(root *durable.Root) error {
	lost := func(there string) error {
		return &errdefs.Corrupt{Invariant: "M2", Object: "database " + root.Path(layout.DatabaseFile), Detail: "it is missing, and there is " + there}
	}
	if stands(root, layout.LogFile) {
		return lost(layout.LogFile)
	}
	for _, dir := range layout.Dirs() {
		if dir.Path == layout.BlobsDir || dir.Path == layout.BlobsDir+"/sha256" || dir.Path == layout.TrashDir || dir.Path == layout.StagingDir || dir.Path == layout.IngestDir {
			continue // of shards, or of what no record names
		}
		if entries, err := os.ReadDir(root.Path(dir.Path)); err == nil && len(entries) > 0 {
			return lost(path.Join(dir.Path, entries[0].Name()))
		}
	}
	return nil
}
