package image

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"varve.dev/durable"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/snapshotter"
)

// opened is a store as far up as images.
type opened struct {
	*Store
	unpacker *countingUnpacker
}

// openStore makes a store in a temporary folder, with connections that lose
// patience fast.
func openStore(t testing.TB, options RemoteOptions) *opened {
	t.Helper()
	return openStoreIn(t, t.TempDir(), options)
}

func openStoreIn(t testing.TB, dir string, options RemoteOptions) *opened {
	t.Helper()
	testkit.NeedRoot(t)
	if options.Patience == (Patience{}) {
		options.Patience = testPatience
	}
	o, err := teststore.Open(t.Context(), filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	remotes := NewRemotes(options)
	u := &countingUnpacker{Snapshotter: o.Snaps}
	t.Cleanup(func() {
		remotes.Close()
		if err := o.End(); err != nil {
			t.Error(err)
		}
	})
	return &opened{New(Config{Root: o.Root, DB: o.DB, Journal: o.Journal, Blobs: o.Blobs, Unpacker: u, Remotes: remotes}), u}
}

// testPatience keeps the proportions of the default and makes a test of
// silence take a second.
var testPatience = Patience{
	Answer: 400 * time.Millisecond, Silence: 400 * time.Millisecond,
	Attempts: 4, Backoff: 10 * time.Millisecond, MaxBackoff: 50 * time.Millisecond, Total: 5 * time.Second,
}

// countingUnpacker is the real one, and counts.
type countingUnpacker struct {
	*snapshotter.Snapshotter
	unpacked atomic.Int64 // layers, over all images
}

type countingUnpack struct {
	Unpack
	unpacked *atomic.Int64
}

func (u *countingUnpacker) Begin(ctx context.Context, lease *metadata.Lease, chain []layout.DiffID, barrier *durable.Barrier) (Unpack, error) {
	p, err := u.Snapshotter.Begin(ctx, lease, chain, barrier)
	return countingUnpack{p, &u.unpacked}, err
}

func (p countingUnpack) Layer(ctx context.Context, i int, tar io.Reader) error {
	p.unpacked.Add(1)
	return p.Unpack.Layer(ctx, i, tar)
}

// setup is a registry that holds img, a proxy before it, and an empty store.
func setup(t *testing.T, img testkit.Image, repoTag string) (*opened, *testkit.Proxy, Ref) {
	t.Helper()
	r := testkit.Registry(t)
	r.Push(t, img, repoTag)
	proxy := testkit.NewProxy(t, r.Addr, nil)
	ref, err := ParseRef(proxy.Ref(repoTag))
	if err != nil {
		t.Fatal(err)
	}
	return openStore(t, RemoteOptions{}), proxy, ref
}

// empty fails the test if the store shows anything.
func (o *opened) empty(t *testing.T) {
	t.Helper()
	if err := o.journal.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	err := o.db.View(t.Context(), func(tx *metadata.Tx) error {
		if !tx.Images().Empty() || !tx.Blobs().Empty() || !tx.Leases().Empty() || !tx.Intents().Empty() {
			t.Error("the store has records of what failed")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// ingests lists what unfinished blobs there are.
func (o *opened) ingests(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(o.root.Path(layout.IngestDir))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
