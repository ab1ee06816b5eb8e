package metadata

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// fillCache puts so many cache records, and removes all but every tenth.
func fillCache(t testing.TB, db *DB, n int) {
	t.Helper()
	fillCacheKeeping(t, db, n, 10)
}

func fillCacheKeeping(t testing.TB, db *DB, n, every int) {
	t.Helper()
	key := func(i int) string { return fmt.Sprintf("%064x", i*7919) }
	for from := 0; from < n; from += 5000 {
		doUpdate(t, db, func(tx *Tx) error {
			for i := from; i < min(n, from+5000); i++ {
				rec := layout.CacheRecord{Description: strings.Repeat("step ", 20), LastUse: time.Unix(int64(i), 0)}
				if err := tx.PutCache(key(i), rec); err != nil {
					return err
				}
			}
			return nil
		})
	}
	for from := 0; from < n; from += 5000 {
		doUpdate(t, db, func(tx *Tx) error {
			for i := from; i < min(n, from+5000); i++ {
				if i%every != 0 {
					if err := tx.Drop(layout.CacheNode(key(i))); err != nil {
						return err
					}
				}
			}
			return nil
		})
	}
}

// contents are every entry of a database but the state of its commits.
func contents(t testing.TB, db *DB) map[string]string {
	t.Helper()
	all := map[string]string{}
	must(t, db.ForCheck().View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error {
			if string(name) != layout.BucketLogTail && string(name) != layout.BucketMeta {
				all[string(name)] = fmt.Sprint(b.Sequence())
			}
			return b.ForEach(func(k, v []byte) error {
				if string(name) != layout.BucketLogTail && string(k) != layout.StateKey {
					all[string(name)+"/"+string(k)] = string(v)
				}
				return nil
			})
		})
	}))
	return all
}

const compactRecords = 60_000

// The file shrinks to what it holds, holds the same, and is the one that the next
// opening finds.
func TestCompact(t *testing.T) {
	dir := t.TempDir()
	db := openDB(t, dir)
	fillCache(t, db, compactRecords)
	before := contents(t, db)
	size, free, err := db.Spare()
	must(t, err)
	live, worth, err := db.WorthCompacting()
	if err != nil || !worth || live != size-free {
		t.Fatalf("%d of %d bytes are free, and it is not worth it (%v)", free, size, err)
	}
	must(t, db.Compact(t.Context()))
	now, _, err := db.Spare()
	must(t, err)
	t.Logf("%d records of %d: %d bytes, %d of them free, became %d", compactRecords/10, compactRecords, size, free, now)
	if now > live*3/2 {
		t.Errorf("what is live takes %d bytes, the new file %d", live, now)
	}
	if !maps.Equal(before, contents(t, db)) {
		t.Error("it holds something else")
	}
	must(t, db.Check(t.Context()))
	doUpdate(t, db, func(tx *Tx) error { return tx.Blobs().Put(digestOf(1), layout.BlobRecord{Size: 1}) })
	if _, worth, err := db.WorthCompacting(); worth || err != nil {
		t.Errorf("it is worth compacting again: %v", err)
	}
	after := contents(t, db)
	must(t, db.Close())
	again := openDB(t, dir)
	if !maps.Equal(after, contents(t, again)) {
		t.Error("opened again it holds something else")
	}
	if leftover, _ := filepath.Glob(filepath.Join(dir, durable.TempPrefix+"*")); len(leftover) > 0 {
		t.Errorf("left over: %q", leftover)
	}
}

// Commits and reads go on while a database is compacted, again and again; none is
// lost, and whoever reads sees one state to its end.
func TestCompactInUse(t *testing.T) {
	db := newDB(t)
	db.h.bolt.StrictMode = false
	fillCache(t, db, 8000)
	stop := make(chan struct{})
	var work sync.WaitGroup
	var counts [3]int
	for w := range counts {
		work.Go(func() {
			for ; ; counts[w]++ {
				select {
				case <-stop:
					return
				default:
				}
				i := 10_000*w + counts[w]
				if err := db.Update(context.Background(), func(tx *Tx) error {
					err := tx.Blobs().Put(digestOf(i), layout.BlobRecord{Size: int64(i)})
					if i%3 == 2 {
						err = errors.Join(err, tx.Blobs().Delete(digestOf(i-1)))
					}
					return err
				}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	work.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			err := db.View(context.Background(), func(tx *Tx) error {
				first := length(tx.Blobs())
				time.Sleep(20 * time.Millisecond)
				if again := length(tx.Blobs()); again != first {
					t.Errorf("%d blobs, and then %d, in one view", first, again)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 8 {
		must(t, db.Compact(t.Context()))
	}
	close(stop)
	work.Wait()
	view(t, db, func(tx *Tx) error {
		for w, n := range counts {
			if n == 0 {
				t.Error("no commit got through")
			}
			for i := 10_000 * w; i < 10_000*w+n; i++ {
				deleted := (i+1)%3 == 2 && i+1 < 10_000*w+n
				if tx.Blobs().Has(digestOf(i)) == deleted {
					t.Errorf("blob %d of worker %d: there is %t", i-10_000*w, w, !deleted)
				}
			}
		}
		return nil
	})
	must(t, db.Check(t.Context()))
	t.Logf("%v commits beside 8 compactions", counts)
}

// A compaction that is called off, or for which the disk is too small, leaves the
// database as it was, and nothing beside it.
func TestCompactThatFails(t *testing.T) {
	leaves := func(t *testing.T, dir string, db *DB, before map[string]string) {
		t.Helper()
		if !maps.Equal(before, contents(t, db)) {
			t.Error("the database holds something else")
		}
		if leftover, _ := filepath.Glob(filepath.Join(dir, durable.TempPrefix+"*")); len(leftover) > 0 {
			t.Errorf("left over: %q", leftover)
		}
		doUpdate(t, db, func(tx *Tx) error { return tx.Blobs().Put(digestOf(1), layout.BlobRecord{}) })
	}
	t.Run("called off", func(t *testing.T) {
		dir := t.TempDir()
		db := openDB(t, dir)
		fillCache(t, db, 1000)
		before := contents(t, db)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := db.Compact(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		leaves(t, dir, db, before)
	})
	t.Run("disk full", func(t *testing.T) {
		testkit.NeedRoot(t)
		dir := filepath.Join(testkit.Ext4(t, 40).Dir, "db")
		must(t, os.Mkdir(dir, 0o711))
		db := openDB(t, dir)
		fillCache(t, db, 8000)
		before := contents(t, db)
		filler, err := os.Create(filepath.Join(filepath.Dir(dir), "filler"))
		must(t, err)
		for err == nil {
			_, err = filler.Write(make([]byte, 64<<10))
		}
		must(t, filler.Close())
		if err := db.Compact(t.Context()); !errors.Is(err, errdefs.ErrResourceExhausted) {
			t.Errorf("%v", err)
		}
		must(t, os.Remove(filler.Name()))
		leaves(t, dir, db, before)
		must(t, db.Compact(t.Context()))
	})
	t.Run("suspected", func(t *testing.T) {
		dir := t.TempDir()
		db := openDB(t, dir)
		fillCache(t, db, 1000)
		before := contents(t, db)
		must(t, os.WriteFile(filepath.Join(dir, layout.SuspectFile), []byte("0 test\n"), 0o600))
		if err := db.Compact(t.Context()); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("%v", err)
		}
		leaves(t, dir, db, before)
	})
}

// Another process that waits for the database while it is compacted gets the new
// one, and not before it is closed.
func TestOpenOverACompaction(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(openRoot(t, dir), Options{})
	must(t, err)
	fillCache(t, db, 1000)
	other := make(chan *DB, 1)
	go func() {
		db, err := Open(openRoot(t, dir), Options{LockTimeout: 20 * time.Second})
		if err != nil {
			t.Error(err)
		}
		other <- db
	}()
	time.Sleep(50 * time.Millisecond) // until it waits
	must(t, db.Compact(t.Context()))
	doUpdate(t, db, func(tx *Tx) error { return tx.Blobs().Put(digestOf(1), layout.BlobRecord{}) })
	want := contents(t, db)
	time.Sleep(50 * time.Millisecond)
	select {
	case <-other:
		t.Error("the database was opened twice")
	default:
	}
	must(t, db.Close())
	if db := <-other; db != nil {
		if !maps.Equal(want, contents(t, db)) {
			t.Error("the other process has something else")
		}
		must(t, db.Close())
	}
}

const (
	compactKillDir   = "VARVE_TEST_COMPACT_DIR"
	compactKillPoint = "VARVE_TEST_COMPACT_POINT"
)

// TestKillWhileCompacting kills a process before and after the new database gets
// the old one's name.
func TestKillWhileCompacting(t *testing.T) {
	if dir := os.Getenv(compactKillDir); dir != "" {
		db := openDB(t, dir)
		durable.OnPoint(func(p string) {
			if p == os.Getenv(compactKillPoint) {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		})
		must(t, db.Compact(t.Context()))
		t.Fatal("it was not killed")
	}
	for _, point := range []string{layout.PointCompactMade, layout.PointCompactPublished} {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			root := openRoot(t, dir)
			db, err := Open(root, Options{})
			must(t, err)
			fillCache(t, db, 3000)
			before := contents(t, db)
			must(t, db.Close())
			cmd := exec.Command(os.Args[0], "-test.run=^TestKillWhileCompacting$")
			cmd.Env = append(os.Environ(), compactKillDir+"="+dir, compactKillPoint+"="+point)
			out, err := cmd.CombinedOutput()
			if state, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !state.Signaled() {
				t.Fatalf("%v: %s", err, out)
			}
			again := openDB(t, dir)
			if !maps.Equal(before, contents(t, again)) {
				t.Error("it holds something else")
			}
			if stands(root, temporaryDatabase) {
				t.Error("the temporary file is still there")
			}
			must(t, again.Check(t.Context()))
		})
	}
}

// BenchmarkCompact compacts a million records of which nine in ten were removed, or
// none, beside a caller that commits one change after the other.
func BenchmarkCompact(b *testing.B) {
	for _, every := range []int{10, 1} {
		b.Run(fmt.Sprintf("kept=%d%%", 100/every), func(b *testing.B) { benchCompact(b, every) })
	}
}

func benchCompact(b *testing.B, every int) {
	for b.Loop() {
		b.StopTimer()
		db := newDB(b)
		db.h.bolt.StrictMode = false
		fillCacheKeeping(b, db, 1_000_000, every)
		size, _, err := db.Spare()
		must(b, err)
		alone := time.Duration(0)
		for i := range 100 {
			alone = max(alone, timedCommit(db, i))
		}
		longest, stop, commits := make(chan time.Duration, 1), make(chan struct{}), 0
		debug.FreeOSMemory()
		held, peak := anonymous(b), peakAnonymous(b, stop)
		go func() {
			var most time.Duration
			for ; ; commits++ {
				select {
				case <-stop:
					longest <- most
					return
				default:
					most = max(most, timedCommit(db, commits))
				}
			}
		}()
		b.StartTimer()
		must(b, db.Compact(context.Background()))
		b.StopTimer()
		close(stop)
		b.ReportMetric(float64((<-longest).Microseconds())/1e3, "ms-longest-commit")
		b.ReportMetric(float64(alone.Microseconds())/1e3, "ms-longest-of-100-before")
		b.ReportMetric(float64(commits), "commits")
		b.ReportMetric(float64(<-peak-held)/1e6, "MB-memory-more")
		after, _, err := db.Spare()
		must(b, err)
		b.ReportMetric(float64(size)/1e6, "MB-before")
		b.ReportMetric(float64(after)/1e6, "MB-after")
		b.StartTimer()
	}
}

// timedCommit is how long a small change takes.
func timedCommit(db *DB, i int) time.Duration {
	begin := time.Now()
	_ = db.Update(context.Background(), func(tx *Tx) error {
		return tx.Blobs().Put(digestOf(i%100), layout.BlobRecord{Size: int64(i)})
	})
	return time.Since(begin)
}

// anonymous is the memory of this process that is not files', in bytes.
func anonymous(b *testing.B) int64 {
	b.Helper()
	data, err := os.ReadFile("/proc/self/status")
	must(b, err)
	_, after, _ := strings.Cut(string(data), "RssAnon:")
	var kib int64
	_, err = fmt.Sscan(after, &kib)
	must(b, err)
	return kib << 10
}

// peakAnonymous tells the most that anonymous was until stop is closed.
func peakAnonymous(b *testing.B, stop <-chan struct{}) <-chan int64 {
	told := make(chan int64, 1)
	go func() {
		most := int64(0)
		for tick := time.NewTicker(5 * time.Millisecond); ; {
			most = max(most, anonymous(b))
			select {
			case <-stop:
				tick.Stop()
				told <- most
				return
			case <-tick.C:
			}
		}
	}()
	return told
}

// The log shrinks to what it tells of while commits go on, none of which it
// loses.
func TestCompactLog(t *testing.T) {
	dir := t.TempDir()
	db := openDB(t, dir)
	db.h.bolt.StrictMode = false
	long := strings.Repeat("x", 2000)
	for i := range 3000 {
		doUpdate(t, db, func(tx *Tx) error {
			return tx.Blobs().Put(digestOf(i%20), layout.BlobRecord{Size: int64(i), Labels: map[string]string{"x": long}})
		})
	}
	if !db.LogWorthCompacting() {
		t.Error("a log of 3,000 changes to 20 records is not worth it")
	}
	stop := make(chan struct{})
	var work sync.WaitGroup
	n := 0
	work.Go(func() {
		for ; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := db.Update(context.Background(), func(tx *Tx) error { return tx.Blobs().Put(digestOf(100+n), layout.BlobRecord{Size: int64(n)}) }); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 5 {
		must(t, db.CompactLog(t.Context()))
		time.Sleep(10 * time.Millisecond)
	}
	close(stop)
	work.Wait()
	fi, err := os.Stat(filepath.Join(dir, layout.LogFile))
	must(t, err)
	if fi.Size() > 20*3000+int64(n)*1000 {
		t.Errorf("the log has %d bytes", fi.Size())
	}
	logged := db.LoggedRecords()
	if got := len(logged[layout.BucketBlobs]); got != 20+n || n == 0 {
		t.Errorf("the log tells of %d blobs, there are %d", got, 20+n)
	}
	must(t, db.Close())
	again := openDB(t, dir)
	if got := len(again.LoggedRecords()[layout.BucketBlobs]); got != 20+n {
		t.Errorf("opened again it tells of %d blobs", got)
	}
}
