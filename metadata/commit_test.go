package metadata

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// Callers that wait for one commit share the next.
func TestGroupCommit(t *testing.T) {
	db := newDB(t)
	db.h.bolt.StrictMode = false
	before, _ := db.Commits()
	const callers, each = 32, 20
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for i := range each {
				err := db.Update(t.Context(), func(tx *Tx) error {
					return tx.Blobs().Put(digestOf(c*each+i), layout.BlobRecord{Size: int64(c)})
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	after, updates := db.Commits()
	if updates != callers*each {
		t.Errorf("%d updates counted, want %d", updates, callers*each)
	}
	if n := after - before; n > callers*each/4 {
		t.Errorf("%d commits for %d updates of %d callers", n, callers*each, callers)
	} else {
		t.Logf("%d commits for %d updates", n, callers*each)
	}
	view(t, db, func(tx *Tx) error {
		if n := length(tx.Blobs()); n != callers*each {
			t.Errorf("%d records, want %d", n, callers*each)
		}
		return nil
	})
}

// An update that fails, or panics, leaves nothing behind and takes nothing of
// the others of its commit with it.
func TestFailingUpdatesInAGroup(t *testing.T) {
	db := newDB(t)
	refused := errors.New("refused")
	// The first update holds the commit loop while the others gather.
	gate, held := make(chan struct{}), make(chan struct{})
	var once sync.Once
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = db.Update(t.Context(), func(*Tx) error {
			once.Do(func() { close(held) })
			<-gate
			return nil
		})
	})
	<-held
	errs := make([]error, 30)
	for i := range errs {
		wg.Go(func() {
			errs[i] = db.Update(t.Context(), func(tx *Tx) error {
				if err := tx.Blobs().Put(digestOf(i), layout.BlobRecord{Size: int64(i)}); err != nil {
					return err
				}
				switch i % 3 {
				case 1:
					return refused
				case 2:
					panic("a page is bad")
				}
				return nil
			})
		})
	}
	time.Sleep(50 * time.Millisecond)
	close(gate)
	wg.Wait()
	view(t, db, func(tx *Tx) error {
		for i, err := range errs {
			switch i % 3 {
			case 0:
				must(t, err)
			case 1:
				if !errors.Is(err, refused) {
					t.Errorf("update %d: %v", i, err)
				}
			case 2:
				if errdefs.AsCorrupt(err) == nil {
					t.Errorf("update %d: %v", i, err)
				}
			}
			if got := tx.Blobs().Has(digestOf(i)); got != (i%3 == 0) {
				t.Errorf("record %d is there: %v", i, got)
			}
		}
		return nil
	})
	if err := db.root.Poisoned(); err != nil {
		t.Errorf("updates that failed by themselves poisoned the root: %v", err)
	}
}

func TestUpdateContext(t *testing.T) {
	db := newDB(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 50 { // the queue may take it or the context may end it; not both
		ran := false
		err := db.Update(ctx, func(*Tx) error { ran = true; return nil })
		if ran != (err == nil) {
			t.Fatalf("ran %v, error %v", ran, err)
		}
	}
}

// Settle waits for the commit under way, and makes none.
func TestSettle(t *testing.T) {
	db := openDB(t, t.TempDir())
	must(t, db.Settle(t.Context()))
	if n, _ := db.Commits(); n != 0 {
		t.Errorf("%d commits", n)
	}
	began, goOn, settled := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	var once sync.Once
	go func() {
		_ = db.Update(t.Context(), func(*Tx) error {
			once.Do(func() { close(began) })
			<-goOn
			return nil
		})
	}()
	<-began
	go func() { settled <- db.Settle(t.Context()) }()
	select {
	case err := <-settled:
		t.Errorf("it did not wait for the commit: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(goOn)
	must(t, <-settled)
}

// A commit that cannot reach the disk poisons the root, and nothing is
// acknowledged any more.
func TestFailedCommitPoisons(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	db, err := Open(root, Options{})
	must(t, err)
	put := func(i int) error {
		return db.Update(t.Context(), func(tx *Tx) error { return tx.Blobs().Put(digestOf(i), layout.BlobRecord{}) })
	}
	must(t, put(1))
	// The descriptor becomes one that can be read and not written.
	ro, err := os.Open(db.path)
	must(t, err)
	defer ro.Close()
	must(t, unix.Dup3(int(ro.Fd()), int(db.h.file.Fd()), unix.O_CLOEXEC))
	for i := 2; i < 4; i++ {
		if err := put(i); !errors.Is(err, errdefs.ErrPoisoned) {
			t.Errorf("update %d: %v", i, err)
		}
	}
	if err := root.WriteFile("x", nil, 0o600); !errors.Is(err, errdefs.ErrPoisoned) {
		t.Errorf("write to the root: %v", err)
	}
	// What failed may show all the same, and be on no disk.
	for what, err := range map[string]error{
		"view": db.View(t.Context(), func(*Tx) error { return nil }), "settle": db.Settle(t.Context()),
	} {
		if !errors.Is(err, errdefs.ErrPoisoned) {
			t.Errorf("%s: %v", what, err)
		}
	}
	db.Close()
	checkFile(t, filepath.Join(dir, layout.DatabaseFile))
	db = openDB(t, dir)
	view(t, db, func(tx *Tx) error {
		if !tx.Blobs().Has(digestOf(1)) || tx.Blobs().Has(digestOf(2)) {
			t.Error("not the last acknowledged state")
		}
		return nil
	})
}

// After a failed sync the page cache may have what no disk has. Whoever opens
// the database next sees the disk: here it lacks the newest meta page.
func TestPoisonedLeavesNothingInTheCache(t *testing.T) {
	for _, poisoned := range []bool{false, true} {
		disk := testkit.Ext4(t, 32)
		root := openRoot(t, disk.Dir)
		db, err := Open(root, Options{})
		must(t, err)
		for i := range 3 {
			must(t, db.Update(t.Context(), func(tx *Tx) error { return tx.Blobs().Put(digestOf(i), layout.BlobRecord{}) }))
		}
		page := make([]byte, os.Getpagesize())
		_, err = db.h.file.ReadAt(page, newestMetaPage(t, db.h.file))
		must(t, err)
		disk.Spoil(t, page)
		if poisoned {
			root.Poison(errors.New("the disk said no"))
		}
		must(t, db.Close())
		must(t, root.Close())
		db, err = Open(openRoot(t, disk.Dir), Options{})
		if err == nil {
			must(t, db.Close())
		}
		if seen := errdefs.AsCorrupt(err) != nil; seen != poisoned {
			t.Errorf("poisoned: %t; the disk is seen: %t (%v)", poisoned, seen, err)
		}
	}
}

func newestMetaPage(t *testing.T, f *os.File) int64 {
	t.Helper()
	m, err := (&pageChecker{file: f}).newestMeta()
	must(t, err)
	return int64(m.txid%2) * int64(m.pageSize)
}

// A full disk refuses an update with ErrResourceExhausted, keeps what was
// there, and takes updates again when there is room.
func TestDiskFull(t *testing.T) {
	needRoot(t)
	for _, kind := range []string{"tmpfs", "ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			dir := mountSmall(t, kind)
			root, err := durable.Open(dir)
			must(t, err)
			db, err := Open(root, Options{})
			must(t, err)
			closeAll := sync.OnceFunc(func() { db.Close(); root.Close() })
			defer closeAll()
			must(t, db.Update(t.Context(), func(tx *Tx) error { return fillBlobs(tx, 0, 10) }))
			ballast := fillDisk(t, dir)
			acked, refusals := 10, 0
			for i := 0; i < 400 && refusals < 3; i++ {
				err := db.Update(t.Context(), func(tx *Tx) error { return fillBlobs(tx, acked, acked+500) })
				switch {
				case err == nil:
					acked += 500
				case errors.Is(err, errdefs.ErrResourceExhausted):
					refusals++
				default:
					t.Fatalf("after %d records: %v", acked, err)
				}
			}
			if refusals == 0 {
				t.Fatal("the disk never got full")
			}
			checkBlobs(t, db, acked)
			must(t, os.Remove(ballast))
			unix.Sync() // freed blocks of btrfs come back with its commit
			must(t, db.Update(t.Context(), func(tx *Tx) error { return fillBlobs(tx, acked, acked+10) }))
			checkBlobs(t, db, acked+10)
			closeAll()
			checkFile(t, filepath.Join(dir, layout.DatabaseFile))
		})
	}
}

// A store that cannot be made for want of room says so and nothing else.
func TestCreateOnFullDisk(t *testing.T) {
	needRoot(t)
	dir := mountSmall(t, "tmpfs")
	ballast := fillDisk(t, dir)
	root, err := durable.Open(dir)
	must(t, err)
	defer root.Close()
	if _, err := Open(root, Options{}); !errors.Is(err, errdefs.ErrResourceExhausted) || errdefs.AsCorrupt(err) != nil {
		t.Errorf("open: %v", err)
	}
	must(t, os.Remove(ballast))
	db, err := Open(root, Options{})
	must(t, err)
	must(t, db.Close())
}

func fillBlobs(tx *Tx, from, to int) error {
	for i := from; i < to; i++ {
		rec := layout.BlobRecord{Size: int64(i), Labels: map[string]string{"pad": strings.Repeat("x", 1000)}}
		if err := tx.Blobs().Put(digestOf(i), rec); err != nil {
			return err
		}
	}
	return nil
}

func checkBlobs(t *testing.T, db *DB, want int) {
	t.Helper()
	view(t, db, func(tx *Tx) error {
		n := 0
		err := tx.Blobs().Each("", func(layout.BlobDigest, layout.BlobRecord) error { n++; return nil })
		if n != want {
			t.Errorf("%d records, acknowledged were %d", n, want)
		}
		return err
	})
}

// mountSmall mounts a small file system of this kind for the test.
func mountSmall(t *testing.T, kind string) string {
	t.Helper()
	dir := t.TempDir()
	if kind == "tmpfs" {
		must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"))
	} else {
		size := map[string]int64{"ext4": 32 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}[kind]
		img := filepath.Join(t.TempDir(), "disk")
		must(t, os.WriteFile(img, nil, 0o600))
		must(t, os.Truncate(img, size))
		run(t, "mkfs."+kind, "-q", img)
		run(t, "mount", "-o", "loop", img, dir)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// fillDisk leaves next to nothing free and returns the file that takes it.
func fillDisk(t *testing.T, dir string) string {
	t.Helper()
	name := filepath.Join(dir, "ballast")
	f, err := os.Create(name)
	must(t, err)
	defer f.Close()
	buf := make([]byte, 64<<10)
	for i := range buf {
		buf[i] = byte(i * 7)
	}
	for size := len(buf); size >= 512; size /= 2 {
		for {
			if _, err = f.Write(buf[:size]); err != nil {
				break
			}
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(fmt.Errorf("ballast: %w", err))
		}
	}
	return name
}
