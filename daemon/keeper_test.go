package daemon

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"varve.dev/api/varve"
	"varve.dev/errdefs"
	"varve.dev/metadata"
)

// kept is a store that a daemon keeps, and what it has said.
type kept struct {
	*Keeper
	mu   sync.Mutex
	said []string
}

func keep(t *testing.T, p Place) *kept {
	t.Helper()
	return keepScrubbing(t, p, Scrub{})
}

func keepScrubbing(t *testing.T, p Place, s Scrub) *kept {
	t.Helper()
	k := &kept{}
	var err error
	k.Keeper, err = Keep(t.Context(), Options{Root: p.Root, State: p.State, Scrub: s}, func(line string) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.said = append(k.said, line)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return k
}

func (k *kept) saidOf(text string) (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, line := range k.said {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

// stumble has the database meet what looks like damage and is none.
func (k *kept) stumble(t *testing.T) {
	t.Helper()
	err := do(t.Context(), k.Keeper, func(ctx context.Context, e *Engine) error {
		return e.db.View(ctx, func(*metadata.Tx) error { panic("as bbolt does") })
	})
	if !errors.Is(err, varve.ErrReopened) && errdefs.AsCorrupt(err) == nil {
		t.Errorf("the call that stumbled: %v", err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
	}
}

// Whoever calls while the store is opened again waits, or is told to call once
// more; a guest stays a guest; a call that does not end by itself is ended.
func TestCallsWhileReopening(t *testing.T) {
	p := testPlace(t)
	k := keep(t, p)
	server, err := Listen(filepath.Join(p.State, DaemonSocket), k.Keeper)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close(context.Background())
	guest := join(t, p)
	defer guest.Close(context.Background())

	stop := make(chan struct{})
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := guest.List(t.Context()); err != nil && !errors.Is(err, varve.ErrReopened) {
					t.Errorf("a call: %v", err)
					return
				}
			}
		})
	}
	long, began := make(chan error, 1), make(chan struct{})
	go func() {
		long <- do(t.Context(), k.Keeper, func(ctx context.Context, _ *Engine) error {
			close(began)
			<-ctx.Done()
			return ctx.Err()
		})
	}()
	<-began
	k.stumble(t)
	if err := <-long; !errors.Is(err, varve.ErrReopened) {
		t.Errorf("the long call: %v", err)
	}
	eventually(t, "the store is open again", func() bool { return k.saidOf("is open again") == 1 })
	if _, err := guest.Info(t.Context()); err != nil {
		t.Errorf("the guest's next call: %v", err)
	}
	close(stop)
	callers.Wait()
}

// What opening again does not confirm does not close the store again and
// again: it works on, but for the calls that come upon it.
func TestFalseAlarms(t *testing.T) {
	k := keep(t, testPlace(t))
	k.stumble(t)
	eventually(t, "the store is open again", func() bool { return k.saidOf("is open again") == 1 })
	for range 3 {
		k.stumble(t)
		if _, err := k.List(t.Context()); err != nil {
			t.Errorf("a call that has nothing to do with it: %v", err)
		}
	}
	if n := k.saidOf("being opened again"); n != 1 {
		t.Errorf("it was opened again %d times", n)
	}
}

// After a failed sync the store is not opened again by the same process,
// whatever looks damaged then.
func TestFailedSyncIsNotHealed(t *testing.T) {
	p := testPlace(t)
	k := keep(t, p)
	k.term.engine.root.Poison(errors.New("sync varve.db: input/output error"))
	k.stumble(t)
	eventually(t, "it says so", func() bool { return k.saidOf("a sync has failed") == 1 })
	if n := k.saidOf("being opened again"); n != 0 {
		t.Error("it was opened again")
	}
	if _, err := k.Info(t.Context()); err != nil {
		t.Errorf("reading: %v", err)
	}
	if err := k.Tag(t.Context(), varve.TagRequest{Source: "a", Target: "b"}); err == nil || errors.Is(err, varve.ErrReopened) {
		t.Errorf("writing: %v", err)
	}
	if err := k.Close(t.Context()); err != nil {
		t.Error(err)
	}
	next := join(t, p) // it is whole
	if err := next.Close(t.Context()); err != nil {
		t.Error(err)
	}
}
