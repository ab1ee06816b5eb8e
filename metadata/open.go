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
	if fi, err := os.Lstat(path); err == nil && !fi.Mode().IsRegular() {
		return nil, &errdefs.Corrupt{Invariant: "M2", Object: "database " + path, Detail: fmt.Sprintf("it is no regular file but %v", fi.Mode().Type())}
	}
	for deadline := time.Now().Add(wait); ; {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, err
		}
		if err = lock(f, deadline); err == nil && !hasName(f, path) {
			unlock(f) // another has taken its place meanwhile: see [DB.Compact]
			continue
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
}

// lock keeps other processes out of a file, and waits for them until deadline.
func lock(f *os.File, deadline time.Time) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if !time.Now().Before(deadline) {
			return fmt.Errorf("%s: %w", f.Name(), ErrLocked)
		}
		time.Sleep(lockInterval)
	}
}

// hasName tells whether a name leads to the open file.
func hasName(f *os.File, path string) bool {
	mine, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Lstat(path)
	return err == nil && os.SameFile(mine, named)
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
	length := int64(0)
	if fi, err := os.Stat(path); err == nil {
		length = fi.Size()
	}
	return openBoltMapped(path, wait, mapSizeOf(length), ready)
}

// openBoltMapped maps the file with so many bytes at least.
func openBoltMapped(path string, wait time.Duration, mapped int, ready func(*os.File) error) (b *bolt.DB, file *os.File, err error) {
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
		// flush more for the commit that needs it. And to map a file that has
		// outgrown its map bbolt waits until nobody reads, which may be long:
		// see [DB.watch].
		InitialMmapSize: mapped,
	})
	return b, file, openError(path, err)
}

// mapSizeOf leaves a large database room to grow to twice its size. A map of
// what is not there yet takes nothing but addresses.
func mapSizeOf(length int64) int {
	if length <= maxPagesRead*int64(os.Getpagesize()) {
		return firstLength
	}
	return 2 * int(length)
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

// fill makes the buckets and the store's own records.
func fill(btx *bolt.Tx) error {
	for _, name := range layout.Buckets() {
		if _, err := btx.CreateBucketIfNotExists([]byte(name)); err != nil {
			return err
		}
	}
	tx := &Tx{bolt: btx}
	meta := layout.MetaRecord{Format: layout.FormatVersion, ID: layout.NewID(), Created: time.Now().UTC()}
	if err := tx.metas().Put(layout.MetaKey, meta); err != nil {
		return err
	}
	return tx.mark(0)
}

// check is the bounded look at a database that is being opened: the buckets
// and the store record, whatever the number of records.
func (db *DB) check() error {
	return db.View(context.Background(), func(tx *Tx) error {
		db.h.committed.Store(uint64(tx.bolt.ID()))
		missing := func(bucket string) error {
			return &errdefs.Corrupt{Invariant: "M2", Object: "database " + db.path, Detail: "bucket " + bucket + " is missing"}
		}
		if tx.bolt.Bucket([]byte(layout.BucketMeta)) == nil {
			return missing(layout.BucketMeta)
		}
		var err error
		if db.meta, err = tx.metas().Get(layout.MetaKey); err != nil {
			return &errdefs.Corrupt{Invariant: "M2", Object: "database " + db.path, Detail: err.Error()}
		}
		for _, name := range layout.Buckets() {
			if tx.bolt.Bucket([]byte(name)) == nil && (db.meta.Format > formatWithoutAccounts || !slices.Contains(addedWithAccounts, name)) {
				return missing(name)
			}
		}
		switch db.meta.Format {
		case formatWithoutSums:
			return nil
		case formatWithoutAccounts, layout.FormatVersion:
			return tx.checkState()
		}
		return fmt.Errorf("store %s has format %d, this varve knows format %d: %w",
			db.root.Path("."), db.meta.Format, layout.FormatVersion, errdefs.ErrFailedPrecondition)
	})
}

// checkState finds a database whose pages are older than its meta page.
func (tx *Tx) checkState() error {
	state, err := tx.states().Get(layout.StateKey)
	if err == nil && state.Commit != uint64(tx.bolt.ID()) {
		err = fmt.Errorf("it is of commit %d, the database of %d", state.Commit, tx.bolt.ID())
	}
	if err != nil {
		return &errdefs.Corrupt{Invariant: "M5", Object: "state record", Detail: err.Error()}
	}
	return nil
}

// suspect leaves a note for the next opening if err is damage of the database,
// tells whoever waits for [DB.Damaged], and returns err.
func (db *DB) suspect(h *handle, err error) error {
	c := errdefs.AsCorrupt(err)
	if c == nil || !strings.HasPrefix(c.Invariant, "M") {
		return err
	}
	db.noting.Lock()
	defer db.noting.Unlock()
	if !db.inPlace(h) {
		return err // of a file that was read in full and copied, and is going
	}
	if !stands(db.root, layout.SuspectFile) {
		// The store may be poisoned, or the disk full: then the next
		// opening has to find it by itself.
		_ = db.root.WriteFile(layout.SuspectFile, fmt.Appendf(nil, "%d %s\n", h.committed.Load(), c.Error()), 0o600)
	}
	db.damage.set(err)
	return err
}

// suspicion is what suspect has left: layout.SuspectFile.
type suspicion struct {
	stands bool
	commit uint64 // the database has been that far
}

func readSuspicion(root *durable.Root) (note suspicion) {
	text, err := os.ReadFile(root.Path(layout.SuspectFile))
	note.stands = !errors.Is(err, fs.ErrNotExist)
	_, _ = fmt.Sscan(string(text), &note.commit) // none: 0
	return note
}

// setAside takes what is no regular file out of the place of one: to the trash.
// Opening it might wait, or lead out of the store.
func setAside(root *durable.Root, name string) error {
	fi, err := os.Lstat(root.Path(name))
	if err != nil || fi.Mode().IsRegular() {
		return nil
	}
	return root.Rename(name, layout.TrashPath(layout.NewID()))
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
