package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
)

func testPlace(t *testing.T) Place {
	t.Helper()
	testkit.NeedRoot(t)
	dir := t.TempDir()
	p := Place{Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state")}
	t.Cleanup(func() {
		if err := teststore.Check(p.Root); err != nil {
			t.Error(err)
		}
	})
	return p
}

func join(t *testing.T, p Place) *Joined {
	t.Helper()
	j, err := Join(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// The command that has the store open is done; its guests are not.
func TestGuestsOfAnEmbeddedStore(t *testing.T) {
	p := testPlace(t)
	first := join(t, p)
	guest := join(t, p)
	if !first.Embedded || guest.Embedded {
		t.Fatalf("embedded: the first %t, its guest %t", first.Embedded, guest.Embedded)
	}
	left := make(chan error, 1)
	go func() { left <- first.Close(context.Background()) }()
	time.Sleep(50 * time.Millisecond)
	if _, err := guest.List(t.Context()); err != nil {
		t.Errorf("a guest's first call after the host was done: %v", err)
	}
	late := join(t, p)
	if late.Embedded {
		t.Error("the store was opened twice")
	}
	if err := guest.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := late.List(t.Context()); err != nil {
		t.Errorf("the guest that came late: %v", err)
	}
	select {
	case err := <-left:
		t.Fatalf("the host left before its guest: %v", err)
	default:
	}
	if err := late.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-left; err != nil {
		t.Error(err)
	}
	next := join(t, p)
	if !next.Embedded {
		t.Error("nobody has the store open, and it was not opened")
	}
	if err := next.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// A daemon that was told to end takes no new guests and lets those it has
// finish.
func TestGuestsOfADaemonThatEnds(t *testing.T) {
	p := testPlace(t)
	k, err := Keep(t.Context(), Options{Root: p.Root, State: p.State}, nil)
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(p.State, DaemonSocket)
	server, err := Listen(socket, k)
	if err != nil {
		t.Fatal(err)
	}
	guest := join(t, p)
	ended := make(chan error, 1)
	go func() { ended <- server.Close(context.Background()) }()
	for {
		if _, err := os.Lstat(socket); errors.Is(err, os.ErrNotExist) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if _, err := guest.List(t.Context()); err != nil {
		t.Errorf("a guest's call after the daemon was told to end: %v", err)
	}
	if _, err := joinHost(t.Context(), "unix://"+socket); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("a new guest of a daemon that ends: %v", err)
	}
	if err := guest.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if err := errors.Join(<-ended, k.Close(t.Context())); err != nil {
		t.Error(err)
	}
}

// Commands that come and go at once always find a way to the store.
func TestManyJoins(t *testing.T) {
	p := testPlace(t)
	const commands, rounds = 6, 15
	errs := make(chan error, commands)
	for range commands {
		go func() {
			errs <- func() error {
				for range rounds {
					j, err := Join(t.Context(), p)
					if err != nil {
						return err
					}
					_, err = j.List(t.Context())
					if err := errors.Join(err, j.Close(t.Context())); err != nil {
						return err
					}
				}
				return nil
			}()
		}()
	}
	for range commands {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}
