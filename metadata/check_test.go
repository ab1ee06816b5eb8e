package metadata

import (
	"compress/gzip"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Whatever is put, replaced, taken away, tried and undone, every bucket's sum
// is that of its entries.
func TestSumsAreKept(t *testing.T) {
	db := newDB(t)
	r := rand.New(rand.NewPCG(1, 1))
	refused := errors.New("refused")
	change := func(tx *Tx) error {
		i := r.IntN(40)
		node := layout.CacheNode(cacheKey(i))
		switch r.IntN(7) {
		case 0:
			return tx.Blobs().Put(digestOf(i), layout.BlobRecord{Size: r.Int64N(3)})
		case 1:
			return tx.Blobs().Delete(digestOf(i))
		case 2:
			return tx.PutImage(imageName(i), layout.ImageRecord{})
		case 3:
			return tx.Link(damageEdge(i))
		case 4:
			return tx.Unlink(damageEdge(i))
		case 5:
			return tx.PutCache(cacheKey(i), cacheRecord(r.IntN(40)))
		}
		return tx.Drop(node)
	}
	for range 150 {
		end := error(nil)
		if r.IntN(3) == 0 {
			end = refused
		}
		err := db.Update(t.Context(), func(tx *Tx) error {
			for range r.IntN(6) {
				if err := change(tx); err != nil {
					return err
				}
			}
			return end
		})
		if !errors.Is(err, end) {
			t.Fatal(err)
		}
		must(t, db.Check(t.Context()))
	}
}

// Whatever shape bbolt gives its trees, the check finds nothing wrong with it.
func TestTreesOfAnyShape(t *testing.T) {
	db := newDB(t)
	db.h.bolt.StrictMode = false // it takes longer than all the rest
	r := rand.New(rand.NewPCG(2, 1))
	for range treeRounds {
		from, width := r.IntN(6000), 1+r.IntN(600)
		remove := r.IntN(100)
		doUpdate(t, db, func(tx *Tx) error {
			for range r.IntN(400) {
				i := from + r.IntN(width)
				if r.IntN(100) < remove {
					if err := tx.Blobs().Delete(digestOf(i)); err != nil {
						return err
					}
					continue
				}
				rec := layout.BlobRecord{Labels: map[string]string{"pad": strings.Repeat("x", r.IntN(1<<r.IntN(13)))}}
				if err := errors.Join(tx.Blobs().Put(digestOf(i), rec), tx.Link(damageEdge(i))); err != nil {
					return err
				}
			}
			return nil
		})
		must(t, db.Check(t.Context()))
	}
}

const treeRounds = 100

// A store of a format before opens with everything, and has sums and accounts
// from then on. Those in testdata were written by the last commits that had
// these formats.
func TestOlderFormats(t *testing.T) {
	t.Run("format1", func(t *testing.T) { olderFormat(t, "format1", layout.Accounts{}) })
	t.Run("format2", func(t *testing.T) {
		olderFormat(t, "format2", layout.Accounts{
			layout.AccountLayers: {Count: 5, Bytes: 5 * 12288, Inodes: 20}, layout.AccountSpareLayers: {Count: 2, Bytes: 2 * 12288, Inodes: 8},
			layout.AccountSpareBlobs: {Count: 2, Bytes: 2 * 4096, Inodes: 2}, layout.AccountCache: {Count: 5},
		})
	})
}

func olderFormat(t *testing.T, format string, want layout.Accounts) {
	dir := t.TempDir()
	for _, name := range []string{layout.DatabaseFile, layout.LogFile} {
		must(t, unzip(filepath.Join("testdata", format, name+".gz"), filepath.Join(dir, name)))
	}
	for range 2 {
		db, err := Open(openRoot(t, dir), Options{})
		must(t, err)
		if got := db.Meta().Format; got != layout.FormatVersion {
			t.Errorf("format %d", got)
		}
		view(t, db, func(tx *Tx) error {
			if blobs, images, sweeps := length(tx.Blobs()), length(tx.Images()), length(tx.Sweeps()); blobs < 60 || images != 60 || sweeps != 1 {
				t.Errorf("%d blobs, %d images, %d sweeps", blobs, images, sweeps)
			}
			accounts, err := tx.Accounts()
			for name, u := range want {
				if accounts[name] != u {
					t.Errorf("account %s: %+v, not %+v", name, accounts[name], u)
				}
			}
			return err
		})
		must(t, db.Check(t.Context()))
		doUpdate(t, db, func(tx *Tx) error { return tx.AddOrigin(digestOf(1), "registry.example/one") })
		must(t, db.Close())
	}
}

func unzip(from, to string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return err
	}
	data, err := io.ReadAll(z)
	return errors.Join(err, os.WriteFile(to, data, 0o600))
}

// overwrite changes a file under whoever has it mapped.
func overwrite(t *testing.T, dir string, at int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, layout.DatabaseFile), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt(data, at)
	must(t, err)
}

// bbolt goes back to the other meta page when the newer one is damaged. Nobody
// is told an older state, and nothing is built on it.
func TestDatabaseThatGoesBack(t *testing.T) {
	for newest := range int64(2) {
		dir := t.TempDir()
		root := openRoot(t, dir)
		db, err := Open(root, Options{})
		must(t, err)
		put := func(i int) error {
			return db.Update(t.Context(), func(tx *Tx) error { return tx.Blobs().Put(digestOf(i), layout.BlobRecord{}) })
		}
		for i := 0; i == 0 || db.h.committed.Load()%2 != uint64(newest); i++ {
			must(t, put(i))
		}
		select {
		case <-db.Damaged():
			t.Error("damaged before anything was")
		default:
		}
		overwrite(t, dir, newest*4096+20, []byte("damage"))
		err = db.View(t.Context(), func(*Tx) error { return nil })
		if c := errdefs.AsCorrupt(err); c == nil || c.Invariant != "M5" {
			t.Errorf("view: %v", err)
		}
		if err := put(9); errdefs.AsCorrupt(err) == nil {
			t.Errorf("update: %v", err)
		}
		<-db.Damaged()
		if errdefs.AsCorrupt(db.Damage()) == nil {
			t.Errorf("damage: %v", db.Damage())
		}
		db.Close()
		if _, err := Open(root, Options{}); errdefs.AsCorrupt(err) == nil {
			t.Errorf("open again: %v", err)
		}
	}
}

// What was noticed is no less so for being consistent: a commit that the log
// does not tell of is gone, and the next opening knows.
func TestDatabaseThatWentBackIsRefused(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	db, err := Open(root, Options{})
	must(t, err)
	must(t, db.NewLease("before").Make(t.Context()))
	old, err := os.ReadFile(filepath.Join(dir, layout.DatabaseFile))
	must(t, err)
	must(t, db.NewLease("gone").Make(t.Context()))
	newest := int64(db.h.committed.Load()%2) * 4096
	overwrite(t, dir, newest, old[newest:newest+4096]) // as if it had not been written
	if err := db.View(t.Context(), func(*Tx) error { return nil }); errdefs.AsCorrupt(err) == nil {
		t.Errorf("view: %v", err)
	}
	db.Close()
	if _, err := Open(root, Options{}); errdefs.AsCorrupt(err) == nil {
		t.Errorf("open again: %v", err)
	}
}

// A bucket of buckets that has lost some, while it is open.
func TestBucketsThatGo(t *testing.T) {
	for left := range byte(3) {
		dir := t.TempDir()
		db, err := Open(openRoot(t, dir), Options{})
		must(t, err)
		var root int64
		view(t, db, func(tx *Tx) error { root = int64(tx.bolt.Cursor().Bucket().Root()); return nil })
		overwrite(t, dir, root*4096+10, []byte{left, 0})
		if err := db.Check(t.Context()); errdefs.AsCorrupt(err) == nil {
			t.Errorf("%d buckets are left: %v", left, err)
		}
		db.Close()
	}
}

// openLarge opens a database that opening does not read in full, and returns
// where one of its leaves stands in the file.
func openLarge(t *testing.T, dir string) (db *DB, leaf int64) {
	t.Helper()
	db, err := Open(openRoot(t, dir), Options{})
	must(t, err)
	t.Cleanup(func() { db.Close() })
	for from := 0; from < 8000; from += 1000 {
		doUpdate(t, db, func(tx *Tx) error {
			for i := from; i < from+1000; i++ {
				rec := layout.BlobRecord{Labels: map[string]string{"pad": strings.Repeat("x", 1000)}}
				if err := tx.Blobs().Put(digestOf(i), rec); err != nil {
					return err
				}
			}
			return nil
		})
	}
	view(t, db, func(tx *Tx) error {
		for id := maxPagesRead / 2; ; id++ {
			info, err := tx.bolt.Page(id)
			if err != nil || info == nil {
				t.Fatalf("page %d: %v", id, err)
			}
			if info.Type == "leaf" && info.Count > 1 {
				leaf = int64(id) * 4096
				return nil
			}
		}
	})
	if wait := db.firstWatch(false); wait != watchAfter {
		t.Fatalf("it is small: read again in %v", wait)
	}
	return db, leaf
}

// Of a large database opening reads the branches; a leaf that has lost an
// entry is found while it is open, and at the next opening.
func TestLargeDatabaseIsWatched(t *testing.T) {
	dir := t.TempDir()
	db, leaf := openLarge(t, dir)
	must(t, db.Check(t.Context()))
	must(t, db.Close())
	overwrite(t, dir, leaf+10, []byte{1, 0}) // one element
	db, err := Open(openRoot(t, dir), Options{})
	must(t, err)
	if err := db.Damage(); err != nil {
		t.Errorf("opening has read the leaves: %v", err)
	}
	db.done.Go(func() { db.watch(time.Millisecond) })
	select {
	case <-db.Damaged():
	case <-time.After(20 * time.Second):
		t.Error("nobody noticed")
	}
	must(t, db.Close())
	if _, err := Open(openRoot(t, dir), Options{}); errdefs.AsCorrupt(err) == nil {
		t.Errorf("open again: %v", err)
	}
}

// Commits go on while the database is read, even if it grows, and ending it
// does not wait.
func TestWatchIsInNobodysWay(t *testing.T) {
	dir := t.TempDir()
	db, _ := openLarge(t, dir)
	must(t, db.Close())
	db, err := Open(openRoot(t, dir), Options{})
	must(t, err)
	defer db.Close()
	grown := make(chan error, 1)
	view(t, db, func(*Tx) error {
		go func() {
			grown <- db.Update(t.Context(), func(tx *Tx) error {
				long := map[string]string{"pad": strings.Repeat("x", 20<<20)}
				return tx.Blobs().Put(digestOf(-1), layout.BlobRecord{Labels: long})
			})
		}()
		select {
		case err := <-grown:
			return err
		case <-time.After(20 * time.Second):
			return errors.New("a commit waits for a reader")
		}
	})
	checked := make(chan error, 1)
	go func() { checked <- db.checkOpen(db.pace()) }()
	for i, done := 0, false; !done || i < 20; i++ {
		doUpdate(t, db, func(tx *Tx) error { return tx.Blobs().Delete(digestOf(i)) })
		select {
		case err := <-checked:
			must(t, err)
			done = true
		default:
		}
	}
	go func() { checked <- db.checkOpen(db.pace()) }()
	began := time.Now()
	must(t, db.Close())
	if err := <-checked; err != nil && !errors.Is(err, errdefs.ErrUnavailable) {
		t.Error(err)
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("closing took %v", took)
	}
}

// A panic in bbolt leaves its locks behind. Whoever waits for a commit, or to
// close, does not wait for ever.
func TestCommitBehindALock(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	db, err := Open(root, Options{})
	must(t, err)
	lock, err := db.h.bolt.Begin(true) // held for ever
	must(t, err)
	defer lock.Rollback()
	ended := make(chan error, 1)
	go func() { ended <- db.Update(t.Context(), func(*Tx) error { return nil }) }()
	time.Sleep(20 * time.Millisecond)
	db.broken.set(&errdefs.Corrupt{Invariant: "M1", Object: "database"})
	select {
	case err := <-ended:
		if errdefs.AsCorrupt(err) == nil || root.Poisoned() == nil {
			t.Errorf("update: %v; poisoned: %v", err, root.Poisoned())
		}
	case <-time.After(2 * brokenWait):
		t.Error("the update waits")
	}
	closed := make(chan error, 1)
	go func() { closed <- db.Close() }()
	select {
	case err := <-closed:
		must(t, err)
	case <-time.After(2 * brokenWait):
		t.Error("closing waits")
	}
	db, err = Open(openRoot(t, dir), Options{})
	must(t, err)
	must(t, db.Close())
}
