package gc_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"varve.dev/gc"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
	"varve.dev/metadata"
)

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// host is a store with a collector.
type host struct {
	*teststore.Store
	*gc.Collector
}

func newHost(t testing.TB) host {
	t.Helper()
	s := teststore.New(t)
	return host{s, collect(t, s)}
}

func collect(t testing.TB, s *teststore.Store) *gc.Collector {
	t.Helper()
	c := gc.New(gc.Config{Root: s.Root, DB: s.DB, Journal: s.Journal, Blobs: s.Blobs})
	t.Cleanup(c.Close)
	return c
}

// step is a build result: a committed snapshot with files of its own.
type step struct {
	key  string
	on   layout.SnapshotKey
	size int // bytes
	used time.Duration
	took time.Duration
}

var day = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func snapshotOf(key string) layout.SnapshotKey { return layout.SnapshotKey("build:" + key) }

// make makes a result. Its snapshot is held by nothing but the cache.
func (h host) make(t testing.TB, s step) {
	t.Helper()
	ctx := t.Context()
	lease := h.DB.NewLease("step")
	must(t, lease.Make(ctx))
	active := layout.SnapshotKey("step:" + s.key)
	must(t, h.Snaps.PrepareFor(ctx, lease.Node(), active, s.on))
	tree, err := h.Snaps.Tree(ctx, active)
	must(t, err, os.WriteFile(filepath.Join(tree.Upper, "file-"+s.key), make([]byte, s.size), 0o644))
	record := layout.CacheRecord{Snapshots: []layout.SnapshotKey{snapshotOf(s.key)}, Created: day, LastUse: day.Add(s.used), Took: s.took}
	must(t, h.Snaps.CommitFor(ctx, lease.Node(), snapshotOf(s.key), active, func(in *layout.IntentRecord) {
		in.Cache = []layout.CacheMake{{Key: s.key, Record: record}}
	}), lease.Release(ctx))
}

// left are the results that are still there.
func (h host) left(t testing.TB) (keys []string) {
	t.Helper()
	results, err := h.Results(t.Context())
	must(t, err)
	for _, r := range results {
		keys = append(keys, r.Key)
	}
	slices.Sort(keys)
	return keys
}

func (h host) wants(t testing.TB, want ...string) {
	t.Helper()
	if got := h.left(t); !slices.Equal(got, want) {
		t.Errorf("%q are left, not %q", got, want)
	}
}

const kib100 = 100 << 10

// keep settles the store with so many bytes of cache.
func (h host) keep(t testing.TB, bytes int64) {
	t.Helper()
	must(t, h.Settle(t.Context(), gc.Limits{Cache: bytes}))
}

func TestTheLeastRecentlyUsedGoes(t *testing.T) {
	h := newHost(t)
	for i, used := range []time.Duration{3, 1, 2} {
		h.make(t, step{key: fmt.Sprint(i), size: kib100, used: used * time.Hour})
	}
	h.keep(t, 300<<10)
	h.wants(t, "0", "2")
	must(t, h.DB.Update(t.Context(), func(tx *metadata.Tx) error { return tx.TouchCache("2", day.Add(9*time.Hour)) }))
	h.keep(t, 150<<10)
	h.wants(t, "2")
}

// Of those about as old, what frees most for the least work goes first.
func TestTheCheapestGoes(t *testing.T) {
	h := newHost(t)
	h.make(t, step{key: "dear", size: kib100, used: 1, took: time.Hour})
	h.make(t, step{key: "cheap", size: kib100, used: 2, took: time.Second})
	h.make(t, step{key: "large", size: 10 * kib100, used: 3, took: time.Second})
	h.keep(t, 300<<10)
	h.wants(t, "cheap", "dear")
	h.keep(t, 150<<10)
	h.wants(t, "dear")
}

// A young result keeps what it stands on, however long that was not used, and
// not a moment longer than it is there itself.
func TestOldParentUnderYoungChild(t *testing.T) {
	h := newHost(t)
	h.make(t, step{key: "parent", size: kib100, used: 1})
	h.make(t, step{key: "other", size: kib100, used: 2 * time.Hour})
	h.make(t, step{key: "child", on: snapshotOf("parent"), size: kib100, used: 3 * time.Hour})
	h.keep(t, 250<<10)
	h.wants(t, "child", "parent")
	h.keep(t, 150<<10)
	h.wants(t, "parent")
	h.keep(t, 1)
	h.wants(t)
}

// What an image, a container or an operation under way needs does not go, and
// goes when it does not need it any more.
func TestWhatIsInUseStays(t *testing.T) {
	h := newHost(t)
	for _, key := range []string{"container", "free", "image", "lease"} {
		h.make(t, step{key: key, size: kib100, used: time.Hour})
	}
	ctx := t.Context()
	lease := h.DB.NewLease("build")
	must(t, lease.Hold(ctx, func(*metadata.Tx) ([]layout.Node, error) {
		return []layout.Node{layout.SnapshotNode(snapshotOf("lease"))}, nil
	}))
	holder := layout.ContainerdNode // as an image's would be
	hold := layout.Edge{Parent: holder, Rel: layout.RelHolds, Child: layout.SnapshotNode(snapshotOf("image"))}
	must(t, h.DB.Update(ctx, func(tx *metadata.Tx) error { return tx.Link(hold) }),
		h.Snaps.PrepareFor(ctx, holder, "container:x", snapshotOf("container")))
	h.keep(t, 1)
	h.wants(t, "container", "image", "lease")
	must(t, h.DB.Update(ctx, func(tx *metadata.Tx) error { return tx.Unlink(hold) }), lease.Release(ctx), h.Snaps.RemoveFor(ctx, holder, "container:x"))
	h.keep(t, 1)
	h.wants(t)
}

// A chain of results goes from its end, in one round and with a cost that
// follows its length.
func TestLongChainGoes(t *testing.T) {
	h := newHost(t)
	const n = 300
	for i := range n {
		on := layout.SnapshotKey("")
		if i > 0 {
			on = snapshotOf(fmt.Sprint(i - 1))
		}
		h.make(t, step{key: fmt.Sprint(i), on: on, size: 10, used: time.Hour})
	}
	commits, _ := h.DB.Commits()
	h.keep(t, 1)
	h.wants(t)
	if after, _ := h.DB.Commits(); after-commits > 20 {
		t.Errorf("%d commits for a chain of %d", after-commits, n)
	}
}

func TestAge(t *testing.T) {
	h := newHost(t)
	now := time.Since(day)
	h.make(t, step{key: "old", size: 10, used: now - 2*time.Hour})
	h.make(t, step{key: "new", size: 10, used: now - time.Minute})
	must(t, h.Settle(t.Context(), gc.Limits{CacheAge: time.Hour}))
	h.wants(t, "new")
}

// Leases end when their time is up, and what they alone held goes; a lease of a
// process that lives has no time.
func TestLeasesExpire(t *testing.T) {
	h := newHost(t)
	ctx := t.Context()
	for _, key := range []string{"a", "b"} {
		h.make(t, step{key: key, size: 10})
	}
	ends := time.Now().Add(time.Hour)
	must(t, h.DB.Update(ctx, func(tx *metadata.Tx) error {
		var err error
		for id, rec := range map[layout.LeaseID]layout.LeaseRecord{"ends": {Purpose: "ends", Expires: ends}, "stays": {Purpose: "stays"}} {
			held := layout.SnapshotNode(snapshotOf(map[layout.LeaseID]string{"ends": "a", "stays": "b"}[id]))
			err = errors.Join(err, tx.Leases().Put(id, rec), tx.Link(layout.Edge{Parent: layout.LeaseNode(id), Rel: layout.RelHolds, Child: held}))
		}
		return err
	}))
	h.keep(t, 1)
	h.wants(t, "a", "b")
	if n, err := h.ExpireLeases(ctx, ends.Add(-time.Second)); n != 0 || err != nil {
		t.Errorf("%d leases expired before their time: %v", n, err)
	}
	if n, err := h.ExpireLeases(ctx, ends.Add(time.Second)); n != 1 || err != nil {
		t.Errorf("%d leases expired: %v", n, err)
	}
	h.keep(t, 1)
	h.wants(t, "b")
	must(t, h.DB.Update(ctx, func(tx *metadata.Tx) error { return tx.Drop(layout.LeaseNode("stays")) }))
}

// A prune is called off between two transactions, at once.
func TestPruneIsCalledOff(t *testing.T) {
	h := newHost(t)
	for i := range 20 {
		h.make(t, step{key: fmt.Sprintf("%02d", i), size: 10, used: time.Duration(i)})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.PruneCache(ctx, gc.CachePrune{}); !errors.Is(err, context.Canceled) {
		t.Errorf("called off before it began: %v", err)
	}
	if n := len(h.left(t)); n != 20 {
		t.Errorf("%d results are left", n)
	}
	done, err := h.PruneCache(t.Context(), gc.CachePrune{Before: day.Add(10)})
	must(t, err)
	if n := len(h.left(t)); n != 10 || done.Records != 10 {
		t.Errorf("%d results are left, %+v", n, done)
	}
}

// Directories that others write to are measured, once while nothing changes.
func TestMeasures(t *testing.T) {
	h := newHost(t)
	ctx := t.Context()
	dir := h.Root.Path(layout.CacheMountPath("mount"))
	must(t, os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "a"), make([]byte, kib100), 0o644), os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "b")))
	if n, err := h.Measure(ctx); n != 1 || err != nil {
		t.Errorf("%d measured: %v", n, err)
	}
	if u := h.Usage().CacheMounts; u.Count != 1 || u.Inodes != 2 || u.Bytes < kib100 || u.Bytes > kib100+8192 {
		t.Errorf("a hundred KiB under two names are %+v", u)
	}
	if n, err := h.Measure(ctx); n != 0 || err != nil {
		t.Errorf("%d measured that nobody uses: %v", n, err)
	}
	end, err := h.UseMount(ctx, "mount")
	must(t, err)
	if done, err := h.PruneCache(ctx, gc.CachePrune{}); done.Mounts != 0 || err != nil {
		t.Errorf("a mount in use was pruned: %+v, %v", done, err)
	}
	end()
	done, err := h.PruneCache(ctx, gc.CachePrune{})
	must(t, err, h.Journal.Drain(ctx))
	if _, err := os.Lstat(dir); done.Mounts != 1 || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%+v, and the mount: %v", done, err)
	}
	if u := h.Usage(); u.CacheMounts != (layout.Usage{}) || u.Trash != (layout.Usage{}) {
		t.Errorf("accounts of what is gone: %+v", u)
	}
}

// A database that could be compacted, and has no room for it beside what others
// have claimed, stays as it is: whoever collects does not wait for itself.
func TestCompactionWithoutRoom(t *testing.T) {
	s := teststore.New(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	change := func(fn func(tx *metadata.Tx, key string) error) {
		for from := 0; from < 20_000; from += 4000 {
			must(t, s.DB.Update(ctx, func(tx *metadata.Tx) (err error) {
				for i := from; i < from+4000; i++ {
					err = errors.Join(err, fn(tx, fmt.Sprintf("%064x", i*7919)))
				}
				return err
			}))
		}
	}
	change(func(tx *metadata.Tx, key string) error {
		return tx.PutCache(key, layout.CacheRecord{Description: strings.Repeat("x", 600), LastUse: day})
	})
	change(func(tx *metadata.Tx, key string) error {
		if strings.HasSuffix(key, "7") { // some stay: the copy takes space
			return nil
		}
		return tx.Drop(layout.CacheNode(key))
	})
	live, worth, err := s.DB.WorthCompacting()
	if err != nil || !worth {
		t.Fatalf("%d bytes live, not worth it: %v", live, err)
	}
	c := collect(t, s)
	limited := gc.New(gc.Config{Root: s.Root, DB: s.DB, Journal: s.Journal, Blobs: s.Blobs, Limits: gc.Limits{Size: c.Usage().Total + live + 4<<20}})
	defer limited.Close()
	claim := limited.Space().Claim("another")
	must(t, claim.Reserve(ctx, live), limited.Settle(ctx, limited.Limits))
	if _, worth, err := s.DB.WorthCompacting(); err != nil || !worth {
		t.Errorf("it was compacted into what another has claimed: %v", err)
	}
	claim.Release()
	must(t, limited.Settle(ctx, limited.Limits))
	if _, worth, err := s.DB.WorthCompacting(); err != nil || worth {
		t.Errorf("it was not compacted when there was room: %v", err)
	}
}

// A pin may be written as the name is shown.
func TestPins(t *testing.T) {
	for pattern, want := range map[string][]bool{
		"debian:*":                  {true, true, false, false},
		"debian":                    {true, true, false, false},
		"docker.io/library/*":       {true, true, false, false},
		"debian:12":                 {true, false, false, false},
		"registry.example/team/*":   {false, false, true, false},
		"registry.example/team/a":   {false, false, true, false},
		"somebody/*":                {false, false, false, true},
		"docker.io/somebody/debian": {false, false, false, true},
	} {
		l := gc.Limits{Pins: []string{"nothing", pattern}}
		must(t, l.Check())
		for i, name := range []string{"docker.io/library/debian:12", "docker.io/library/debian:13", "registry.example/team/a:1", "docker.io/somebody/debian:12"} {
			if got := l.Pinned(name); got != want[i] {
				t.Errorf("pin %q, image %s: %t", pattern, name, got)
			}
		}
	}
}
