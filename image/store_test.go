package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/opencontainers/go-digest"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// opened is a store as far up as images, with an unpacker that is
// containerd's.
type opened struct {
	*Store
	unpacker *plainUnpacker
}

// openStore makes a store in a temporary folder, with connections that lose
// patience fast.
func openStore(t testing.TB, options RemoteOptions) *opened {
	t.Helper()
	return openStoreIn(t, t.TempDir(), options)
}

func openStoreIn(t testing.TB, dir string, options RemoteOptions) *opened {
	t.Helper()
	if options.Patience == (Patience{}) {
		options.Patience = testPatience
	}
	o, err := teststore.Open(t.Context(), filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	remotes := NewRemotes(options)
	u := &plainUnpacker{dir: filepath.Join(dir, "trees"), done: map[layout.DiffID]bool{}}
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

// plainUnpacker unpacks each layer alone into a folder with containerd's
// code. It publishes no snapshot: what it tests is the way there.
type plainUnpacker struct {
	dir string

	mu       sync.Mutex
	done     map[layout.DiffID]bool
	unpacked int // layers, over all images
	fail     error
}

func (u *plainUnpacker) Begin(_ context.Context, _ *metadata.Lease, chain []layout.DiffID, _ *durable.Barrier) (Unpack, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	p := &plainUnpack{unpacker: u, chain: chain, missing: make([]bool, len(chain))}
	for i, d := range chain {
		p.missing[i] = !u.done[d]
	}
	return p, nil
}

type plainUnpack struct {
	unpacker *plainUnpacker
	chain    []layout.DiffID
	missing  []bool
}

func (p *plainUnpack) Missing() []bool { return p.missing }

func (p *plainUnpack) Layer(ctx context.Context, i int, tar io.Reader) error {
	u := p.unpacker
	u.mu.Lock()
	u.unpacked++
	fail := u.fail
	u.mu.Unlock()
	if fail != nil {
		return fail
	}
	dir := filepath.Join(u.dir, string(p.chain[i]), "fs")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	sum := digest.Canonical.Digester()
	tar = io.TeeReader(tar, sum.Hash())
	// Layers that link into lower ones cannot be applied alone; this
	// unpacker only reads them.
	if _, err := archive.Apply(ctx, dir, tar); err != nil && !errors.Is(err, os.ErrNotExist) {
		if kindOf(err) == nil {
			return err
		}
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if _, err := io.Copy(io.Discard, tar); err != nil {
		return err
	}
	if got := layout.DiffID(sum.Digest()); got != p.chain[i] {
		return fmt.Errorf("the stream has the digest %s, the config says %s: %w", got, p.chain[i], errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (p *plainUnpack) Finish(context.Context, *layout.IntentRecord) (layout.SnapshotKey, error) {
	p.unpacker.mu.Lock()
	defer p.unpacker.mu.Unlock()
	for _, d := range p.chain {
		p.unpacker.done[d] = true
	}
	return "", nil
}

func (p *plainUnpack) Abandon() {}

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
