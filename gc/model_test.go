package gc_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/content"
	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/gc"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/runtime"
	"varve.dev/runtime/containers"
)

func number(t *testing.T, variable string, otherwise int) int {
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	must(t, err)
	return n
}

// TestAgainstAModel does STEPS random operations for each of SEEDS seeds, with
// collections at random points and beside them, and compares the store with a
// model that knows only who refers to what: whatever is reachable is there, and
// whatever is not is gone, from the database and from the disk.
func TestAgainstAModel(t *testing.T) {
	testkit.NeedRoot(t)
	seeds, first, steps := number(t, "SEEDS", 2), number(t, "SEED", 1), number(t, "STEPS", 250)
	for seed := first; seed < first+seeds; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m := newModel(t, uint64(seed))
			for step := range steps {
				m.step(t)
				if m.r.IntN(25) == 0 || step == steps-1 {
					m.compare(t)
				}
				if m.r.IntN(200) == 0 {
					m.reopen(t)
				}
				if t.Failed() {
					t.Fatalf("seed %d failed at step %d: %v", seed, step, m.did[max(0, len(m.did)-12):])
				}
			}
			m.end(t)
			t.Logf("%d steps: %v", steps, m.counts)
		})
	}
}

// model is a store, and what has to be in it.
type model struct {
	dir string
	s   *teststore.Store
	c   *gc.Collector
	k   *containers.Store
	r   *rand.Rand
	n   int // for names

	snaps      map[layout.SnapshotKey]snap
	cache      map[string]layout.SnapshotKey
	held       map[layout.SnapshotKey]bool // through the API
	containers map[layout.ContainerID]layout.SnapshotKey
	leases     map[layout.LeaseID]layout.SnapshotKey
	images     map[string]picture

	collecting chan error // of a collection beside the operations; nil: none
	counts     map[string]int
	did        []string
}

// snap is a committed snapshot: where it stands, and its tree.
type snap struct {
	on    layout.SnapshotKey
	layer layout.LayerID
	files layout.BlobDigest
}

// picture is an image without layers: two blobs.
type picture struct{ manifest, config layout.BlobDigest }

func newModel(t *testing.T, seed uint64) *model {
	m := &model{
		dir: filepath.Join(t.TempDir(), "store"), r: rand.New(rand.NewPCG(seed, 99)), counts: map[string]int{},
		snaps: map[layout.SnapshotKey]snap{}, cache: map[string]layout.SnapshotKey{}, held: map[layout.SnapshotKey]bool{},
		containers: map[layout.ContainerID]layout.SnapshotKey{}, leases: map[layout.LeaseID]layout.SnapshotKey{}, images: map[string]picture{},
	}
	m.open(t)
	return m
}

func (m *model) open(t *testing.T) {
	t.Helper()
	var err error
	m.s, err = teststore.Open(t.Context(), m.dir)
	must(t, err)
	m.c = gc.New(gc.Config{Root: m.s.Root, DB: m.s.DB, Journal: m.s.Journal, Blobs: m.s.Blobs})
	m.k = containers.New(m.s.Root, m.s.DB, m.s.Journal, m.s.Snaps)
}

// reopen closes the store and opens it again: leases without an expiry end.
func (m *model) reopen(t *testing.T) {
	t.Helper()
	m.await(t)
	m.note("reopen")
	m.c.Close()
	must(t, m.s.Close())
	clear(m.leases)
	m.open(t)
}

func (m *model) end(t *testing.T) {
	t.Helper()
	m.await(t)
	m.c.Close()
	must(t, m.s.End())
}

func (m *model) note(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	m.did = append(m.did, line)
	var verb string
	_, _ = fmt.Sscan(line, &verb)
	m.counts[verb]++
}

// gone tells whether an operation found that a snapshot is gone, which only a
// collection may have removed, and only if nobody but the cache needed it.
func (m *model) gone(t *testing.T, err error, key layout.SnapshotKey) bool {
	t.Helper()
	if err == nil {
		return false
	}
	if !errors.Is(err, errdefs.ErrNotFound) || m.pinned(key) {
		t.Errorf("%s: %v", m.did[len(m.did)-1], err)
	}
	return true
}

// pinned tells whether somebody needs a snapshot, beside the cache.
func (m *model) pinned(key layout.SnapshotKey) bool {
	roots := slices.Concat(slices.Collect(maps.Keys(m.held)), slices.Collect(maps.Values(m.containers)), slices.Collect(maps.Values(m.leases)))
	for _, root := range roots {
		for at := root; at != ""; at = m.snaps[at].on {
			if at == key {
				return true
			}
		}
	}
	return false
}

func pick[K comparable, V any](r *rand.Rand, all map[K]V, less func(a, b K) int) (k K, ok bool) {
	if len(all) == 0 {
		return k, false
	}
	keys := slices.SortedFunc(maps.Keys(all), less)
	return keys[r.IntN(len(keys))], true
}

func byText[K ~string](a, b K) int { return compareText(string(a), string(b)) }

func compareText(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (m *model) step(t *testing.T) {
	t.Helper()
	ops := []func(*testing.T){
		m.makeResult, m.makeResult, m.makeResult, m.makeResult, m.touch, m.hold, m.letGo, m.create, m.create, m.remove,
		m.lease, m.release, m.publish, m.publish, m.untag, m.collect, m.collectBeside, m.await, m.prune,
	}
	ops[m.r.IntN(len(ops))](t)
}

func (m *model) makeResult(t *testing.T) {
	m.n++
	key := fmt.Sprintf("r%05d", m.n)
	on := layout.SnapshotKey("")
	if m.r.IntN(3) > 0 {
		on, _ = pick(m.r, m.snaps, byText)
	}
	m.note("make %s on %q", key, on)
	ctx := t.Context()
	lease := m.s.DB.NewLease("step")
	active, made := layout.SnapshotKey("step:"+key), snapshotOf(key)
	must(t, lease.Make(ctx))
	defer func() {
		must(t, lease.Release(ctx))
		m.s.Journal.Kick()
	}()
	if m.gone(t, m.s.Snaps.PrepareFor(ctx, lease.Node(), active, on), on) {
		return
	}
	tree, err := m.s.Snaps.Tree(ctx, active)
	must(t, err)
	for i := range m.r.IntN(4) {
		must(t, os.WriteFile(filepath.Join(tree.Upper, fmt.Sprint("file", i)), make([]byte, m.r.IntN(64<<10)), 0o644))
	}
	record := layout.CacheRecord{
		Snapshots: []layout.SnapshotKey{made}, Created: day, LastUse: day.Add(time.Duration(m.r.IntN(1000)) * time.Second), Took: time.Duration(m.r.IntN(100)) * time.Second,
	}
	must(t, m.s.Snaps.CommitFor(ctx, lease.Node(), made, active, func(in *layout.IntentRecord) {
		in.Cache = []layout.CacheMake{{Key: key, Record: record}}
	}))
	must(t, m.s.DB.View(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Snapshots().Get(made)
		if err != nil {
			return err
		}
		layer, err := tx.Layers().Get(rec.Layer)
		m.snaps[made] = snap{on: on, layer: rec.Layer, files: layer.Manifest}
		return err
	}))
	m.cache[key] = made
}

func (m *model) touch(t *testing.T) {
	if key, ok := pick(m.r, m.cache, compareText); ok {
		m.note("touch %s", key)
		must(t, m.s.DB.Update(t.Context(), func(tx *metadata.Tx) error {
			return tx.TouchCache(key, day.Add(time.Duration(m.r.IntN(1000))*time.Second))
		}))
	}
}

// reach takes a new reference to a snapshot, in the transaction that finds it.
func (m *model) reach(t *testing.T, n layout.Node, key layout.SnapshotKey) bool {
	return !m.gone(t, m.s.DB.Update(t.Context(), func(tx *metadata.Tx) error {
		if !tx.Snapshots().Has(key) {
			return fmt.Errorf("snapshot %q: %w", key, errdefs.ErrNotFound)
		}
		return tx.Link(layout.Edge{Parent: n, Rel: layout.RelHolds, Child: layout.SnapshotNode(key)})
	}), key)
}

func (m *model) hold(t *testing.T) {
	if key, ok := pick(m.r, m.snaps, byText); ok {
		m.note("hold %s", key)
		if m.reach(t, layout.ContainerdNode, key) {
			m.held[key] = true
		}
	}
}

func (m *model) letGo(t *testing.T) {
	if key, ok := pick(m.r, m.held, byText); ok {
		m.note("letgo %s", key)
		delete(m.held, key)
		must(t, m.s.DB.Update(t.Context(), func(tx *metadata.Tx) error {
			return tx.Unlink(layout.Edge{Parent: layout.ContainerdNode, Rel: layout.RelHolds, Child: layout.SnapshotNode(key)})
		}))
		m.s.Journal.Kick()
	}
}

func (m *model) create(t *testing.T) {
	if key, ok := pick(m.r, m.snaps, byText); ok && len(m.containers) < 6 {
		m.note("create container on %s", key)
		id, _, err := m.k.Create(t.Context(), containers.Image{Name: "x", Config: []byte("{}"), Top: key}, runtime.Spec{Args: []string{"true"}})
		if !m.gone(t, err, key) {
			m.containers[id] = key
		}
	}
}

func (m *model) remove(t *testing.T) {
	if id, ok := pick(m.r, m.containers, byText); ok {
		m.note("remove container on %s", m.containers[id])
		delete(m.containers, id)
		must(t, m.k.Remove(t.Context(), id))
	}
}

func (m *model) lease(t *testing.T) {
	key, ok := pick(m.r, m.snaps, byText)
	if !ok || len(m.leases) >= 4 {
		return
	}
	m.n++
	id := layout.LeaseID(fmt.Sprintf("lease%d", m.n))
	m.note("lease %s", key)
	must(t, m.s.DB.Update(t.Context(), func(tx *metadata.Tx) error { return tx.Leases().Put(id, layout.LeaseRecord{Purpose: "test"}) }))
	if m.reach(t, layout.LeaseNode(id), key) {
		m.leases[id] = key
	} else {
		m.drop(t, layout.LeaseNode(id))
	}
}

func (m *model) drop(t *testing.T, n layout.Node) {
	must(t, m.s.DB.Update(t.Context(), func(tx *metadata.Tx) error { return tx.Drop(n) }))
	m.s.Journal.Kick()
}

func (m *model) release(t *testing.T) {
	if id, ok := pick(m.r, m.leases, byText); ok {
		m.note("release %s", m.leases[id])
		delete(m.leases, id)
		m.drop(t, layout.LeaseNode(id))
	}
}

// publish gives a name to one of few images, whose blobs come, go and come again.
func (m *model) publish(t *testing.T) {
	name := fmt.Sprintf("registry.example/image%d:1", m.r.IntN(4))
	variant := m.r.IntN(6)
	config, err := json.Marshal(ocispec.Image{Author: fmt.Sprint("config", variant/2), RootFS: ocispec.RootFS{Type: "layers"}})
	must(t, err)
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{},
		Config:      ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))},
		Annotations: map[string]string{"variant": fmt.Sprint(variant)},
	})
	must(t, err)
	p := picture{layout.BlobDigest(digest.FromBytes(manifest)), layout.BlobDigest(digest.FromBytes(config))}
	m.note("publish %s as variant %d", name, variant)
	ctx := t.Context()
	barrier := m.s.Root.NewBarrier()
	in := layout.IntentRecord{Purpose: "publish", Edges: []layout.Edge{{Parent: layout.BlobNode(p.manifest), Rel: layout.RelContent, Child: layout.BlobNode(p.config)}}}
	var ingests []*content.Ingest
	for _, data := range [][]byte{config, manifest} {
		ingest, err := m.s.Blobs.NewIngest(ctx, "test", "")
		must(t, err)
		_, err = ingest.Write(data)
		must(t, err)
		move, err := ingest.Seal(barrier, layout.BlobRecord{})
		must(t, err)
		in.Blobs = append(in.Blobs, move)
		ingests = append(ingests, ingest)
	}
	now := time.Now().UTC()
	target := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: p.manifest.Digest(), Size: int64(len(manifest))}
	in.Images = []layout.ImageMake{{Name: name, Record: layout.ImageRecord{Target: target, Created: now, Updated: now}}}
	must(t, m.s.Journal.Publish(ctx, barrier, in))
	for _, ingest := range ingests {
		must(t, ingest.Close())
	}
	m.images[name] = p
}

func (m *model) untag(t *testing.T) {
	if name, ok := pick(m.r, m.images, compareText); ok {
		m.note("untag %s", name)
		delete(m.images, name)
		m.drop(t, layout.ImageNode(name))
	}
}

// limits are some that hurt.
func (m *model) limits() gc.Limits {
	l := gc.Limits{Cache: 1 + m.r.Int64N(1<<20)}
	if m.r.IntN(3) == 0 {
		l = gc.Limits{CacheAge: time.Since(day) - time.Duration(m.r.IntN(1000))*time.Second}
	}
	return l
}

func (m *model) collect(t *testing.T) {
	m.await(t)
	m.note("collect")
	must(t, m.c.Settle(t.Context(), m.limits()))
}

// collectBeside begins a collection that goes on beside what comes next.
func (m *model) collectBeside(t *testing.T) {
	if m.collecting != nil {
		return
	}
	m.note("collect beside")
	done, l := make(chan error, 1), m.limits()
	m.collecting = done
	go func() { done <- m.c.Settle(context.Background(), l) }()
}

func (m *model) await(t *testing.T) {
	t.Helper()
	if m.collecting != nil {
		must(t, <-m.collecting)
		m.collecting = nil
	}
}

func (m *model) prune(t *testing.T) {
	if m.r.IntN(3) > 0 {
		return
	}
	m.await(t)
	m.note("prune")
	_, err := m.c.PruneCache(t.Context(), gc.CachePrune{Before: day.Add(time.Duration(m.r.IntN(1000)) * time.Second), Keep: m.r.Int64N(256 << 10)})
	must(t, err)
}

// compare holds the store against the model.
func (m *model) compare(t *testing.T) {
	t.Helper()
	m.await(t)
	must(t, m.s.Journal.Drain(t.Context()))
	want := map[string]bool{}
	reach := func(key layout.SnapshotKey) {
		for ; key != ""; key = m.snaps[key].on {
			s := m.snaps[key]
			want[string(layout.SnapshotNode(key))], want[string(layout.LayerNode(s.layer))], want[string(layout.BlobNode(s.files))] = true, true, true
		}
	}
	dirs := map[string]bool{}
	must(t, m.s.DB.View(t.Context(), func(tx *metadata.Tx) error {
		for key := range m.cache {
			if !tx.Cache().Has(key) {
				delete(m.cache, key) // a collection's to choose
			}
		}
		for id, key := range m.containers {
			rec, err := tx.Containers().Get(id)
			if err != nil {
				return err
			}
			snap, err := tx.Snapshots().Get(rec.Snapshot)
			if err != nil {
				return err
			}
			want[string(layout.SnapshotNode(rec.Snapshot))] = true
			dirs[layout.ActivePath(snap.Layer)], dirs[layout.ContainerPath(id)] = true, true
			reach(key)
		}
		return nil
	}))
	for _, key := range m.cache {
		reach(key)
	}
	for key := range m.held {
		reach(key)
	}
	for _, key := range m.leases {
		reach(key)
	}
	for _, p := range m.images {
		want[string(layout.BlobNode(p.manifest))], want[string(layout.BlobNode(p.config))] = true, true
	}
	m.compareRecords(t, want)
	m.compareDisk(t, want, dirs)
	for key := range m.snaps {
		if !want[string(layout.SnapshotNode(key))] {
			delete(m.snaps, key)
		}
	}
	report, err := fsck.Run(t.Context(), fsck.Options{Root: m.dir, Level: layout.Normal, DB: m.s.DB.ForCheck(), Boot: m.s.Journal.Boot()})
	must(t, err)
	for _, f := range report.Findings {
		t.Errorf("%s %s at %q: %s", f.Invariant, f.Object, f.Path, f.Detail)
	}
}

func (m *model) compareRecords(t *testing.T, want map[string]bool) {
	t.Helper()
	got := map[string]bool{}
	must(t, m.s.DB.View(t.Context(), func(tx *metadata.Tx) error {
		return errors.Join(
			tx.Snapshots().Each("", func(k layout.SnapshotKey, _ layout.SnapshotRecord) error {
				got[string(layout.SnapshotNode(k))] = true
				return nil
			}),
			tx.Layers().Each("", func(id layout.LayerID, _ layout.LayerRecord) error {
				got[string(layout.LayerNode(id))] = true
				return nil
			}),
			tx.Blobs().Each("", func(d layout.BlobDigest, _ layout.BlobRecord) error {
				got[string(layout.BlobNode(d))] = true
				return nil
			}),
		)
	}))
	for n := range want {
		if !got[n] {
			t.Errorf("%s is needed, and gone", n)
		}
	}
	for n := range got {
		if !want[n] {
			t.Errorf("%s is there, and nobody needs it", n)
		}
	}
}

// compareDisk looks for what is on the disk in vain, or beside it. extra are the
// directories that containers have.
func (m *model) compareDisk(t *testing.T, want, extra map[string]bool) {
	t.Helper()
	on := maps.Clone(extra)
	for n := range want {
		if at := layout.NodePath(layout.Node(n)); at != "" {
			on[at] = true
		}
	}
	for _, pattern := range []string{layout.LayersDir + "/*", layout.ActiveDir + "/*", layout.ContainersDir + "/*", layout.BlobsDir + "/sha256/*/*", layout.TrashDir + "/*", layout.IngestDir + "/*", layout.StagingDir + "/*/*"} {
		found, err := filepath.Glob(filepath.Join(m.dir, pattern))
		must(t, err)
		for _, at := range found {
			rel, _ := filepath.Rel(m.dir, at)
			if !on[rel] {
				t.Errorf("%s is on the disk, and nobody needs it", rel)
			}
			delete(on, rel)
		}
	}
	for rel := range on {
		t.Errorf("%s is needed, and not on the disk", rel)
	}
}
