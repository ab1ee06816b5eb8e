package metadata

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"varve.dev/durable"
	"varve.dev/durable/crashsim"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// What else happens to a database while it is compacted.

// stopped is a context that calls at, once, when it is first asked whether it has
// ended, and has the end that at says.
type stopped struct {
	context.Context
	once sync.Once
	at   func() error
	err  error
}

func (s *stopped) Err() error {
	s.once.Do(func() { s.err = s.at() })
	return s.err
}

func within(t *testing.T, what string, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(20 * time.Second):
		t.Fatalf("%s does not end", what)
		return nil
	}
}

func async(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

// grow is an update that outgrows the map of a database that was just made:
// bbolt waits then until nobody reads.
func grow(db *DB, from int) error {
	return db.Update(context.Background(), func(tx *Tx) error { return fillBlobs(tx, from, from+2000) })
}

// A compaction that ends while a commit waits for readers does not wait for the
// commit.
func TestCompactBesideACommitThatWaits(t *testing.T) {
	for name, end := range map[string]error{"called off": context.Canceled, "goes on": nil} {
		t.Run(name, func(t *testing.T) {
			db := newDB(t)
			var commit <-chan error
			ctx := &stopped{Context: t.Context(), at: func() error {
				commit = async(func() error { return grow(db, 0) })
				time.Sleep(300 * time.Millisecond)
				return end
			}}
			err := within(t, "the compaction", async(func() error { return db.Compact(ctx) }))
			if !errors.Is(err, end) {
				t.Errorf("compact: %v", err)
			}
			must(t, within(t, "the commit", commit))
			checkBlobs(t, db, 2000)
			must(t, db.Check(t.Context()))
		})
	}
}

// What is noted of the old file is not held against the new one, whose commits
// are numbered anew.
func TestDamageNotedWhileCompacting(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	db, err := Open(root, Options{})
	must(t, err)
	fillCache(t, db, 1000)
	for i := range 100 {
		doUpdate(t, db, func(tx *Tx) error { return tx.Blobs().Put(digestOf(i), layout.BlobRecord{}) })
	}
	var reader <-chan error
	durable.OnPoint(func(p string) {
		if p == layout.PointCompactMade {
			reader = async(func() error {
				return db.View(context.Background(), func(*Tx) error { return &errdefs.Corrupt{Invariant: "M1", Object: "test"} })
			})
			time.Sleep(300 * time.Millisecond)
		}
	})
	defer durable.OnPoint(nil)
	must(t, db.Compact(t.Context()))
	if err := within(t, "the reader", reader); errdefs.AsCorrupt(err) == nil {
		t.Errorf("view: %v", err)
	}
	must(t, db.Close())
	db, err = Open(root, Options{})
	must(t, err)
	checkBlobs(t, db, 100)
	must(t, db.Close())
}

// A database that is closed while it is compacted is closed afterwards, whichever
// of the two files it is.
func TestCloseWhileCompacting(t *testing.T) {
	reopen := func(t *testing.T, root *durable.Root, compact, closing <-chan error) {
		err := within(t, "the compaction", compact)
		must(t, within(t, "closing", closing))
		db, oerr := Open(root, Options{})
		if oerr != nil {
			t.Fatalf("open again: %v (the compaction: %v)", oerr, err)
		}
		checkBlobs(t, db, 1)
		must(t, db.Close())
		if stands(root, temporaryDatabase) {
			t.Error("the temporary file is still there")
		}
	}
	prepare := func(t *testing.T) (*durable.Root, *DB) {
		root := openRoot(t, t.TempDir())
		db, err := Open(root, Options{})
		must(t, err)
		doUpdate(t, db, func(tx *Tx) error { return fillBlobs(tx, 0, 1) })
		return root, db
	}
	t.Run("at its beginning", func(t *testing.T) {
		root, db := prepare(t)
		var closing <-chan error
		ctx := &stopped{Context: t.Context(), at: func() error {
			closing = async(db.Close)
			time.Sleep(300 * time.Millisecond)
			return nil
		}}
		compact := async(func() error { return db.Compact(ctx) })
		err := within(t, "the compaction", compact)
		if !errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("compact: %v", err)
		}
		reopen(t, root, async(func() error { return err }), closing)
	})
	t.Run("at its end", func(t *testing.T) {
		root, db := prepare(t)
		var closing <-chan error
		durable.OnPoint(func(p string) {
			if p == layout.PointCompactMade {
				closing = async(db.Close)
				time.Sleep(300 * time.Millisecond)
			}
		})
		defer durable.OnPoint(nil)
		err := within(t, "the compaction", async(func() error { return db.Compact(t.Context()) }))
		reopen(t, root, async(func() error { return err }), closing)
	})
	t.Run("before it", func(t *testing.T) {
		root, db := prepare(t)
		must(t, db.Close())
		if err := db.Compact(t.Context()); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("compact: %v", err)
		}
		reopen(t, root, async(func() error { return nil }), async(func() error { return nil }))
	})
}

// A disk without room for the first page of the new file.
func TestCompactOnAFullDisk(t *testing.T) {
	needRoot(t)
	dir := mountSmall(t, "tmpfs")
	root, err := durable.Open(dir)
	must(t, err)
	defer root.Close()
	db, err := Open(root, Options{})
	must(t, err)
	defer db.Close()
	doUpdate(t, db, func(tx *Tx) error { return fillBlobs(tx, 0, 10) })
	ballast := fillDisk(t, dir)
	if err := db.Compact(t.Context()); !errors.Is(err, errdefs.ErrResourceExhausted) {
		t.Errorf("compact: %v", err)
	}
	if stands(root, temporaryDatabase) {
		t.Error("the temporary file is still there")
	}
	must(t, os.Remove(ballast))
	must(t, db.Compact(t.Context()))
	checkBlobs(t, db, 10)
}

// A commit to a large database does not wait for readers (see [DB.watch]), and not
// after it was compacted either.
func TestCompactLeavesRoomToGrow(t *testing.T) {
	db := newDB(t)
	db.h.bolt.StrictMode = false
	const blobs = 20_000 // of 1 KB: 25 to 32 MiB
	for from := 0; from < blobs; from += 2000 {
		must(t, grow(db, from))
	}
	must(t, db.Compact(t.Context()))
	size, _, err := db.Spare()
	must(t, err)
	view(t, db, func(*Tx) error {
		for from := blobs; from < blobs+10_000; from += 2000 {
			must(t, within(t, fmt.Sprintf("a commit to %d bytes", size), async(func() error { return grow(db, from) })))
		}
		return nil
	})
}

func init() {
	// compact-loop compacts a database one of whose branches leads into itself:
	// bbolt would recurse until the process ends.
	roles["compact-loop"] = func(args []string) error {
		debug.SetMaxStack(64 << 20)
		root, err := durable.Open(args[0])
		if err != nil {
			return err
		}
		db, err := Open(root, Options{})
		if err != nil {
			return err
		}
		var branch int64
		err = db.View(context.Background(), func(tx *Tx) error {
			for id := 2; branch == 0; id++ {
				info, err := tx.bolt.Page(id)
				if err != nil || info == nil {
					return errors.Join(errors.New("there is no branch"), err)
				}
				if info.Type == "branch" {
					branch = int64(id)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		f, err := os.OpenFile(root.Path(layout.DatabaseFile), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		// The page number of the first element.
		if _, err := f.WriteAt([]byte{byte(branch), byte(branch >> 8), 0, 0, 0, 0, 0, 0}, branch*4096+pageHeaderLen+8); err != nil {
			return err
		}
		err = db.Compact(context.Background())
		if errdefs.AsCorrupt(err) == nil {
			return fmt.Errorf("compact: %w", err)
		}
		if db.Damage() == nil {
			return errors.New("nobody is told of the damage")
		}
		if stands(root, temporaryDatabase) {
			return errors.New("the temporary file is still there")
		}
		return nil
	}
}

func TestCompactADamagedDatabase(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(openRoot(t, dir), Options{})
	must(t, err)
	must(t, grow(db, 0))
	must(t, db.Close())
	cmd := child(t, "compact-loop", dir)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	if err := cmd.Run(); err != nil {
		t.Errorf("%v: %.500s", err, &complaints)
	}
}

// A change that the copying does not know of, if there ever is such a mistake, keeps
// the copy from taking the database's place.
func TestCompactLooksAtTheCopy(t *testing.T) {
	for _, forgotten := range []bool{false, true} {
		db := newDB(t)
		doUpdate(t, db, func(tx *Tx) error { return fillBlobs(tx, 0, 100) })
		c := &compaction{db: db, ctx: t.Context()}
		must(t, c.make())
		for _, name := range layout.Buckets() {
			must(t, c.copyBucket(name))
		}
		doUpdate(t, db, func(tx *Tx) error {
			return errors.Join(tx.Blobs().Put(digestOf(50), layout.BlobRecord{Size: 7}), tx.Blobs().Delete(digestOf(51)))
		})
		if forgotten {
			c.nextTouched()
		}
		if err := c.exchange(); errors.Is(err, errdefs.ErrDataLoss) != forgotten || err != nil && !forgotten {
			t.Errorf("forgotten: %t; the exchange: %v", forgotten, err)
		}
		c.end()
		view(t, db, func(tx *Tx) error {
			rec, err := tx.Blobs().Get(digestOf(50))
			if rec.Size != 7 || tx.Blobs().Has(digestOf(51)) {
				t.Errorf("forgotten: %t; a change is lost", forgotten)
			}
			return err
		})
		must(t, db.Check(t.Context()))
		if stands(db.root, temporaryDatabase) {
			t.Error("the temporary file is still there")
		}
	}
}

// A sync of the new file that fails poisons the store, and the old file stays.
func TestCompactThatCannotSync(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	db, err := Open(root, Options{})
	must(t, err)
	doUpdate(t, db, func(tx *Tx) error { return fillBlobs(tx, 0, 10) })
	c := &compaction{db: db, ctx: t.Context()}
	must(t, c.make())
	must(t, c.to.file.Close())
	if err := db.syncCopy(c.to); !errors.Is(err, errdefs.ErrPoisoned) {
		t.Errorf("sync: %v", err)
	}
	c.end()
	checkBlobs(t, db, 10)
	if err := db.Update(t.Context(), func(*Tx) error { return nil }); !errors.Is(err, errdefs.ErrPoisoned) {
		t.Errorf("update: %v", err)
	}
	db.Close()
	checkBlobs(t, openDB(t, dir), 10)
	if stands(root, temporaryDatabase) {
		t.Error("the temporary file is still there")
	}
}

// At every change of a compaction a power cut leaves the one file or the other.
func TestCompactSurvivesPowerCuts(t *testing.T) {
	needRoot(t)
	dir, scratch := t.TempDir(), t.TempDir()
	root := openRoot(t, dir)
	db, err := Open(root, Options{})
	must(t, err)
	fillCache(t, db, 2000)
	want := contents(t, db)
	// No commit comes between: the file is what was synced.
	sim, err := crashsim.Attach(root, crashsim.Database{})
	must(t, err)
	n := 0
	commits := map[uint64]bool{}
	look := func(at string, image func(dir string, mode crashsim.Mode, seed uint64) error) {
		for _, mode := range []crashsim.Mode{crashsim.None, crashsim.All, crashsim.Some} {
			n++
			copied := filepath.Join(scratch, fmt.Sprint(n))
			must(t, image(copied, mode, uint64(n)))
			again := openDB(t, copied)
			if !maps.Equal(want, contents(t, again)) {
				t.Errorf("image %d (%s after %s): it holds something else", n, mode, at)
			}
			commits[again.h.committed.Load()] = true
			must(t, again.Close())
		}
	}
	sim.Every(1, func(at crashsim.Moment) { look(fmt.Sprintf("change %d", at.N), at.Image) })
	must(t, db.Compact(t.Context()))
	sim.Every(0, nil)
	look("the end", sim.Image)
	sim.Detach()
	must(t, errors.Join(sim.Err(), db.Close()))
	if n < 9 || len(commits) != 2 {
		t.Errorf("%d images, with commits %v: not the old file and the new", n, commits)
	}
}

// A reader of the file that was goes on reading it, and nobody waits for it.
func TestCompactBesideASlowReader(t *testing.T) {
	db := newDB(t)
	doUpdate(t, db, func(tx *Tx) error { return fillBlobs(tx, 0, 100) })
	reads, end := make(chan struct{}), make(chan struct{})
	slow := async(func() error {
		return db.ForCheck().View(func(tx *bolt.Tx) error {
			close(reads)
			<-end
			_, err := tx.WriteTo(io.Discard)
			return errors.Join(err, tx.Bucket([]byte(layout.BucketBlobs)).ForEach(func([]byte, []byte) error { return nil }))
		})
	})
	<-reads
	for i := range 3 {
		must(t, within(t, "a compaction", async(func() error { return db.Compact(t.Context()) })))
		must(t, within(t, "a commit", async(func() error { return grow(db, 100+2000*i) })))
		must(t, within(t, "a view", async(func() error { return db.View(context.Background(), func(*Tx) error { return nil }) })))
	}
	close(end)
	must(t, within(t, "the reader", slow))
	checkBlobs(t, db, 6100)
}

// A log that is written anew for another reason while it is compacted lacks none of
// the changes that came in between.
func TestCompactLogBesideARewrite(t *testing.T) {
	db := newDB(t)
	for i := range 200 {
		doUpdate(t, db, func(tx *Tx) error { return fillBlobs(tx, i%3, i%3+1) })
	}
	ctx := &stopped{Context: t.Context(), at: func() error {
		must(t, db.RewriteLog(t.Context()))
		doUpdate(t, db, func(tx *Tx) error { return fillBlobs(tx, 3, 10) })
		return nil
	}}
	if err := db.CompactLog(ctx); err != nil && !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("compact the log: %v", err)
	}
	doUpdate(t, db, func(tx *Tx) error { return fillBlobs(tx, 10, 11) })
	if got := len(db.LoggedRecords()[layout.BucketBlobs]); got != 11 {
		t.Errorf("the log tells of %d blobs, not 11", got)
	}
}

// A log that is compacted while the database is closed is not exchanged afterwards:
// it may be another process's by then.
func TestCloseWhileTheLogIsCompacted(t *testing.T) {
	root := openRoot(t, t.TempDir())
	db, err := Open(root, Options{})
	must(t, err)
	doUpdate(t, db, func(tx *Tx) error { return fillBlobs(tx, 0, 1) })
	closed := make(chan struct{})
	var other *DB
	var opening <-chan error
	ctx := &stopped{Context: t.Context(), at: func() error {
		go func() {
			_ = db.Close()
			close(closed)
		}()
		opening = async(func() (err error) {
			other, err = Open(root, Options{LockTimeout: 10 * time.Second})
			return err
		})
		time.Sleep(300 * time.Millisecond)
		return nil
	}}
	err = within(t, "the compaction", async(func() error { return db.CompactLog(ctx) }))
	<-closed
	must(t, within(t, "the other opening", opening))
	defer other.Close()
	t.Logf("compact the log: %v", err)
	doUpdate(t, other, func(tx *Tx) error { return fillBlobs(tx, 1, 2) })
	if got := len(other.LoggedRecords()[layout.BucketBlobs]); got != 2 {
		t.Errorf("the log tells of %d blobs, not 2", got)
	}
}
