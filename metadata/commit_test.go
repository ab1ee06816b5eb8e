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
	"varve.dev/layout"
)

// Callers that wait for one commit share the next.
func TestGroupCommit(t *testing.T) {
	db := newDB(t)
	db.bolt.StrictMode = false
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
		if n := tx.Blobs().Len(); n != callers*each {
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
	must(t, unix.Dup3(int(ro.Fd()), int(db.file.Fd()), unix.O_CLOEXEC))
	for i := 2; i < 4; i++ {
		if err := put(i); !errors.Is(err, errdefs.ErrPoisoned) {
			t.Errorf("update %d: %v", i, err)
		}
	}
	if err := root.WriteFile("x", nil, 0o600); !errors.Is(err, errdefs.ErrPoisoned) {
		t.Errorf("write to the root: %v", err)
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
