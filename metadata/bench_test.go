package metadata

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/layout"
)

// benchRecords is what DESIGN §9 promises for: a million cache records.
const benchRecords = 1_000_000

// benchSnapshots are the results that the records share.
const benchSnapshots = 10_000

// benchDir returns the directory of the large database, made once and kept in
// VARVE_BENCH_DIR for the next run.
func benchDir(b *testing.B) string {
	b.Helper()
	dir := os.Getenv("VARVE_BENCH_DIR")
	if dir == "" {
		b.Skip("VARVE_BENCH_DIR names no directory for the database, of about 1 GB")
	}
	done := filepath.Join(dir, "complete")
	if _, err := os.Lstat(done); err == nil {
		return filepath.Join(dir, "root")
	}
	must(b, os.RemoveAll(filepath.Join(dir, "root")))
	start := time.Now()
	fillMillion(b, filepath.Join(dir, "root"))
	b.Logf("made %d records in %v", benchRecords, time.Since(start).Round(time.Second))
	must(b, os.WriteFile(done, nil, 0o600))
	return filepath.Join(dir, "root")
}

func cacheKey(i int) string {
	// Spread over the key space as digests are.
	return fmt.Sprintf("sha256:%016x%048x", uint64(i)*0x9E3779B97F4A7C15, i)
}

func cacheRecord(i int) layout.CacheRecord {
	at := time.Unix(1_700_000_000+int64(i), 0).UTC()
	return layout.CacheRecord{
		Snapshots: []layout.SnapshotKey{snapshotKey(i % benchSnapshots)}, Size: int64(i),
		Created: at, LastUse: at, Description: fmt.Sprintf("[stage-1 %d/9] RUN make -C module%d", i%9, i),
	}
}

func fillMillion(b *testing.B, dir string) {
	b.Helper()
	db, err := Open(openRoot(b, dir), Options{})
	must(b, err)
	defer db.Close()
	doUpdate(b, db, func(tx *Tx) error {
		for i := range benchSnapshots {
			if err := tx.PutSnapshot(snapshotKey(i), layout.SnapshotRecord{Kind: layout.SnapshotCommitted, Layer: layerID(i)}); err != nil {
				return err
			}
		}
		return nil
	})
	const batch = 20_000
	for from := 0; from < benchRecords; from += batch {
		doUpdate(b, db, func(tx *Tx) error {
			for i := from; i < from+batch; i++ {
				if err := tx.PutCache(cacheKey(i), cacheRecord(i)); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

func init() {
	// rss opens the store and says what that took of memory.
	roles["rss"] = func(args []string) error {
		before := memory()
		root, err := durable.Open(args[0])
		if err != nil {
			return err
		}
		start := time.Now()
		db, err := Open(root, Options{})
		if err != nil {
			return err
		}
		took := time.Since(start)
		after := memory()
		for i := range 1000 {
			err = errors.Join(err, db.View(context.Background(), func(tx *Tx) error {
				_, err := tx.Cache().Get(cacheKey(i * 997))
				return err
			}))
		}
		fmt.Printf("open %v; before %s; after %s; after 1000 reads %s\n", took.Round(time.Microsecond), before, after, memory())
		return errors.Join(err, db.Close())
	}
}

// memory is the resident set of this process as the kernel counts it.
func memory() string {
	data, _ := os.ReadFile("/proc/self/status")
	var out []string
	for line := range strings.Lines(string(data)) {
		if strings.HasPrefix(line, "RssAnon") || strings.HasPrefix(line, "RssFile") {
			out = append(out, strings.Join(strings.Fields(line), " "))
		}
	}
	return strings.Join(out, ", ")
}

// evict drops a file from the page cache.
func evict(b *testing.B, path string) {
	b.Helper()
	f, err := os.Open(path)
	must(b, err)
	defer f.Close()
	must(b, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

func BenchmarkMillionOpen(b *testing.B) {
	dir := benchDir(b)
	file := filepath.Join(dir, layout.DatabaseFile)
	fi, err := os.Stat(file)
	must(b, err)
	for _, cold := range []bool{false, true} {
		b.Run(fmt.Sprintf("cold=%v", cold), func(b *testing.B) {
			root := openRoot(b, dir)
			b.ReportMetric(float64(fi.Size())/1e6, "MB")
			for b.Loop() {
				if cold {
					b.StopTimer()
					evict(b, file)
					b.StartTimer()
				}
				db, err := Open(root, Options{})
				must(b, err)
				must(b, db.Close())
			}
		})
	}
	out, err := child(b, "rss", dir).Output()
	must(b, err)
	b.Logf("a process of its own: %s", strings.TrimSpace(string(out)))
}

func BenchmarkMillionGet(b *testing.B) {
	db, err := Open(openRoot(b, benchDir(b)), Options{})
	must(b, err)
	defer db.Close()
	for b.Loop() {
		key := cacheKey(rand.IntN(benchRecords))
		must(b, db.View(b.Context(), func(tx *Tx) error {
			_, err := tx.Cache().Get(key)
			return err
		}))
	}
}

// BenchmarkMillionTouch is what a build does for each step it finds: the
// record, its place by last use, and a commit.
func BenchmarkMillionTouch(b *testing.B) {
	dir := benchDir(b)
	for _, callers := range []int{1, 32} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			db, err := Open(openRoot(b, dir), Options{})
			must(b, err)
			defer db.Close()
			var left atomic.Int64
			left.Store(int64(b.N))
			b.ResetTimer()
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						key := cacheKey(rand.IntN(benchRecords))
						if err := db.Update(b.Context(), func(tx *Tx) error { return tx.TouchCache(key, time.Now()) }); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			commits, updates := db.Commits()
			b.ReportMetric(float64(commits)/float64(updates), "commits/op")
		})
	}
}

// BenchmarkMillionCheck reads all of it, as is done while it is open.
func BenchmarkMillionCheck(b *testing.B) {
	db, err := Open(openRoot(b, benchDir(b)), Options{})
	must(b, err)
	defer db.Close()
	for b.Loop() {
		must(b, db.checkOpen(db.pace()))
	}
}

// BenchmarkOpen opens a database that is read in full.
func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir()
	root := openRoot(b, dir)
	db, err := Open(root, Options{})
	must(b, err)
	const records = 10_000
	for from := 0; from < records; from += 500 {
		doUpdate(b, db, func(tx *Tx) (err error) {
			for i := from; i < from+500 && err == nil; i++ {
				err = errors.Join(tx.Blobs().Put(digestOf(i), layout.BlobRecord{Size: int64(i)}), tx.Link(damageEdge(i)))
			}
			return err
		})
	}
	time.Sleep(2 * logSync) // the log is durable, and its tail goes
	doUpdate(b, db, func(*Tx) error { return nil })
	must(b, db.Close())
	fi, err := os.Stat(filepath.Join(dir, layout.DatabaseFile))
	must(b, err)
	for b.Loop() {
		db, err := Open(root, Options{})
		must(b, err)
		must(b, db.Close())
	}
	b.ReportMetric(float64(fi.Size())/1e6, "MB")
}

// BenchmarkMillionEvict drops the record that was used longest ago.
func BenchmarkMillionEvict(b *testing.B) {
	db, err := Open(openRoot(b, benchDir(b)), Options{})
	must(b, err)
	defer db.Close()
	stay := errors.New("stay")
	for b.Loop() {
		err := db.Update(b.Context(), func(tx *Tx) error {
			var oldest string
			tx.EachCacheByUse("", time.Time{}, func(key string, _ time.Time) bool { oldest = key; return false })
			if err := tx.Drop(layout.CacheNode(oldest)); err != nil {
				return err
			}
			return stay // all but the commit: the database is wanted again
		})
		if !errors.Is(err, stay) {
			b.Fatal(err)
		}
	}
}

// BenchmarkCommit is a transaction of so many records, each with an edge,
// where a sync costs nothing: what is left is the processor's time.
func BenchmarkCommit(b *testing.B) {
	for _, records := range []int{1, 20, 500} {
		b.Run(fmt.Sprintf("records=%d", records), func(b *testing.B) {
			dir, err := os.MkdirTemp("/dev/shm", "varve-bench-")
			must(b, err)
			defer os.RemoveAll(dir)
			db, err := Open(openRoot(b, dir), Options{})
			must(b, err)
			defer db.Close()
			const stored = 20_000
			put := func(tx *Tx, i int) error {
				if err := tx.Blobs().Put(digestOf(i), layout.BlobRecord{Size: int64(i), Origins: []string{"registry.example/repository"}}); err != nil {
					return err
				}
				return tx.Link(damageEdge(i))
			}
			for from := 0; from < stored; from += 1000 {
				doUpdate(b, db, func(tx *Tx) (err error) {
					for i := from; i < from+1000 && err == nil; i++ {
						err = put(tx, i)
					}
					return err
				})
			}
			for b.Loop() {
				doUpdate(b, db, func(tx *Tx) (err error) {
					for range records {
						if err == nil {
							err = put(tx, rand.IntN(stored))
						}
					}
					return err
				})
			}
		})
	}
}
