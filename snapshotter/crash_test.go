package snapshotter_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"testing"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"varve.dev/durable/crashsim"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// ledger is what the workload was told. Of a thing that is being changed right
// now either state will do.
type ledger struct {
	mu    sync.Mutex
	there map[string]bool
	doubt map[string]bool
}

// step carries out do, after which thing is there or not.
func (l *ledger) step(t *testing.T, thing string, there bool, do func() error) {
	t.Helper()
	l.mu.Lock()
	l.doubt[thing] = true
	l.mu.Unlock()
	if err := do(); err != nil {
		t.Fatalf("%s: %v", thing, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.there[thing] = there
	delete(l.doubt, thing)
}

// sure returns what has to be so in any aftermath.
func (l *ledger) sure() map[string]bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	sure := maps.Clone(l.there)
	maps.DeleteFunc(sure, func(thing string, _ bool) bool { return l.doubt[thing] })
	return sure
}

// powerCuts takes images of a store at work and recovers each.
type powerCuts struct {
	t       *testing.T
	scratch string
	n       int
}

// at tries the aftermaths of one moment.
func (p *powerCuts) at(when string, ledger *ledger, image func(dir string, mode crashsim.Mode, seed uint64) error) {
	for _, mode := range []crashsim.Mode{crashsim.None, crashsim.All, crashsim.Some} {
		p.n++
		dir := filepath.Join(p.scratch, fmt.Sprint(p.n))
		if err := image(dir, mode, uint64(p.n)); err != nil {
			p.t.Errorf("%s: %v", when, err)
			return
		}
		p.recover(fmt.Sprintf("%s, image %d (%s)", when, p.n, mode), dir, ledger.sure())
		os.RemoveAll(dir)
	}
}

// recover opens an image twice and looks at it in full.
func (p *powerCuts) recover(when, dir string, want map[string]bool) {
	for range 2 {
		o, err := teststore.Open(p.t.Context(), dir)
		if err != nil {
			p.t.Errorf("%s: open: %v", when, err)
			return
		}
		for thing, there := range want {
			if has := isThere(p.t, o, thing); has != there {
				p.t.Errorf("%s: %s: there %t, acknowledged %t", when, thing, has, there)
			}
		}
		if err := o.Close(); err != nil {
			p.t.Errorf("%s: close: %v", when, err)
			return
		}
	}
	if err := teststore.Check(dir); err != nil {
		p.t.Errorf("%s: %v", when, err)
	}
}

func isThere(t *testing.T, o *teststore.Store, thing string) (has bool) {
	err := o.DB.View(t.Context(), func(tx *metadata.Tx) error {
		has = tx.Blobs().Has(layout.BlobDigest(thing)) || tx.Snapshots().Has(layout.SnapshotKey(thing))
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return has
}

// crashEvery is the distance between the changes after which power is cut; 1
// for a campaign.
func crashEvery() int {
	if os.Getenv("VARVE_ALL_CRASHES") != "" {
		return 1
	}
	return 2
}

// minimumImages is lowered by nobody without saying why.
const minimumImages = 150

// TestPowerCutAtEveryChange cuts the power, in a simulation, while a store
// takes in a blob and an image, commits a container's layer and removes both.
// Whatever survives, recovery makes a clean store of it that has all that was
// acknowledged.
func TestPowerCutAtEveryChange(t *testing.T) {
	testkit.NeedRoot(t)
	ctx := t.Context()
	o, err := teststore.Open(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	sim, err := crashsim.Attach(o.Root, crashsim.Database{Name: layout.DatabaseFile, Copy: func(w io.Writer) error {
		return o.DB.ForCheck().View(func(tx *bolt.Tx) error { _, err := tx.WriteTo(w); return err })
	}})
	if err != nil {
		t.Fatal(err)
	}
	l := &ledger{there: map[string]bool{}, doubt: map[string]bool{}}
	cuts := &powerCuts{t: t, scratch: imageScratch(t)}
	sim.Every(crashEvery(), func(at crashsim.Moment) {
		cuts.at(fmt.Sprintf("change %d (kind %d, %s)", at.N, at.Op.Kind, at.Op.Path), l, at.Image)
	})
	crashWork(ctx, t, o, l)
	sim.Every(0, nil)
	cuts.at("the end", l, sim.Image)
	sim.Detach()
	if err := sim.Err(); err != nil {
		t.Error(err)
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("%d changes, %d crash images, %d changes not followed by name", sim.Ops(), sim.Images(), sim.Missed())
	if sim.Images() < minimumImages {
		t.Errorf("%d crash images, the committed minimum is %d", sim.Images(), minimumImages)
	}
}

// imageScratch is in memory if there is such a place: an image is opened,
// checked and thrown away.
func imageScratch(t *testing.T) string {
	if dir, err := os.MkdirTemp("/dev/shm", "varve-crash-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(dir) })
		return dir
	}
	return t.TempDir()
}

func crashWork(ctx context.Context, t *testing.T, o *teststore.Store, l *ledger) {
	data := bytes.Repeat([]byte("a blob by itself. "), 1000)
	d := digest.FromBytes(data)
	l.step(t, d.String(), true, func() error {
		return ccontent.WriteBlob(ctx, o.Blobs, "alone", bytes.NewReader(data), ocispec.Descriptor{Digest: d, Size: int64(len(data))})
	})
	var top layout.SnapshotKey
	l.step(t, "image", false, func() (err error) { top, err = unpackImage(ctx, o); return err })
	l.step(t, string(top), true, func() error { return nil })
	l.step(t, "active", true, func() error { _, err := o.Snaps.Prepare(ctx, "active", string(top)); return err })
	tree, err := o.Snaps.Tree(ctx, "active")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree.Upper, "written"), bytes.Repeat([]byte("by a container "), 900), 0o644); err != nil {
		t.Fatal(err)
	}
	l.step(t, "committed", true, func() error {
		l.mu.Lock()
		delete(l.there, "active") // becomes the committed one
		l.mu.Unlock()
		return o.Snaps.Commit(ctx, "committed", "active")
	})
	l.step(t, "active", false, func() error { return nil })
	l.step(t, "committed", false, func() error { return o.Snaps.Remove(ctx, "committed") })
	l.step(t, d.String(), false, func() error { return o.Blobs.Delete(ctx, d) })
	if err := o.Journal.Drain(ctx); err != nil {
		t.Fatal(err)
	}
}
