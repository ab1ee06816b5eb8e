package corrupttest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/internal/tables"
	"varve.dev/layout"
)

// What each store goes through: so often opened, so many at once, each with so
// many operations.
const (
	openings = 2
	workers  = 3
	opsEach  = 10
)

var hardUseTable = tables.Table{Page: page, Name: "hard use", Head: tables.Row{"stores", "operations", "called off", "refused", "findings and notices"}}

// TestHardUse uses STORES stores hard, at random, and has the witness look at
// each while it is open and when it is closed. It finds nothing.
func TestHardUse(t *testing.T) {
	p := newPlace(t)
	stores, first := number(t, "STORES"), number(t, "SEED")
	h := &hardUse{place: p, done: map[string]int{}}
	for seed := first; seed < first+stores; seed++ {
		h.use(t, seed)
	}
	hardUseTable.Tell(t, tables.Row{
		fmt.Sprint(stores), fmt.Sprint(h.done["done"]), fmt.Sprint(h.done["called off"]), fmt.Sprint(h.done["refused"]), fmt.Sprint(h.found),
	})
	if h.done["done"] == 0 || stores > 2 && h.done["called off"] == 0 {
		t.Errorf("done: %v", h.done)
	}
}

type hardUse struct {
	place
	found int

	mu         sync.Mutex
	done       map[string]int // by what came of them
	containers []string       // by id
}

// use works one store.
func (h *hardUse) use(t *testing.T, seed uint64) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	h.containers = nil
	for opening := range uint64(openings) {
		e, err := daemon.Open(t.Context(), daemon.Options{Root: dir, State: h.state})
		must(t, err)
		var g errgroup.Group
		for worker := range uint64(workers) {
			g.Go(func() error {
				random := rand.New(rand.NewPCG(seed, opening<<8|worker))
				if err := h.pull([]string{awkwardName, stackedName, smallName}[worker])(t.Context(), e); err != nil {
					return err
				}
				for range opsEach {
					if err := h.one(t.Context(), e, random); err != nil {
						return err
					}
				}
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		report, err := e.Fsck(t.Context(), varve.FsckRequest{Level: string(layout.Deep)}, nil)
		must(t, err, e.Close(t.Context()))
		if report.ExitCode != 0 {
			t.Errorf("seed %d, open: %s", seed, report.Text)
		}
		found, err := closed(dir)
		must(t, err)
		h.tell(t, seed, found)
	}
}

func (h *hardUse) tell(t *testing.T, seed uint64, found []fsck.Finding) {
	t.Helper()
	h.found += len(found)
	for _, f := range found {
		t.Errorf("seed %d: %s %s at %q: %s", seed, f.Invariant, f.Object, f.Path, f.Detail)
	}
}

// one takes one operation, perhaps called off. Errors are those that no order
// of operations explains.
func (h *hardUse) one(ctx context.Context, e *daemon.Engine, random *rand.Rand) error {
	what, do := h.choose(random)
	cancel := func() {}
	if random.IntN(4) == 0 {
		ctx, cancel = context.WithTimeout(ctx, time.Duration(random.Int64N(int64(300*time.Millisecond))))
	}
	defer cancel()
	err := do(ctx, e)
	result := "done"
	switch {
	case err == nil:
	case ctx.Err() != nil:
		result = "called off"
	case errors.Is(err, errdefs.ErrNotFound), errors.Is(err, errdefs.ErrAlreadyExists), errors.Is(err, errdefs.ErrFailedPrecondition):
		result = "refused" // somebody else was there before
	default:
		return fmt.Errorf("%s: %w", what, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.done[result]++
	return nil
}

func (h *hardUse) choose(random *rand.Rand) (what string, do op) {
	pulled := []string{awkwardName, stackedName, smallName, indexName}[random.IntN(4)]
	made := fmt.Sprintf("%s:%d", []string{"built", "tagged", "made"}[random.IntN(3)], random.IntN(3))
	any := []string{h.ref(pulled), made}[random.IntN(2)]
	switch random.IntN(12) {
	case 0, 1, 2:
		return "pull " + pulled, h.pull(pulled)
	case 3, 4:
		name, number := fmt.Sprintf("built:%d", random.IntN(3)), random.IntN(4)
		return fmt.Sprintf("build %s, %d", name, number), h.build(name, number)
	case 5:
		return "tag " + any, tag(any, fmt.Sprintf("tagged:%d", random.IntN(3)))
	case 6, 7:
		return "remove " + any, remove(any)
	case 8:
		return "push " + any, h.push(any)
	case 9:
		return "save and load " + any, saveAndLoad(any)
	case 10:
		return "container of " + any, h.container(any, fmt.Sprintf("made:%d", random.IntN(3)))
	default:
		return "remove a container", h.removeContainer
	}
}

// container makes one, writes to its layer and makes an image of it.
func (h *hardUse) container(image, name string) op {
	return func(ctx context.Context, e *daemon.Engine) error {
		c, err := e.Create(ctx, varve.CreateRequest{Image: image, Command: []string{"true"}, Pull: "never"}, nil)
		if err != nil {
			return err
		}
		h.mu.Lock()
		h.containers = append(h.containers, c.ID)
		h.mu.Unlock()
		if err := write(c, "for "+name); err != nil {
			return err
		}
		return commit(c.ID, name)(ctx, e)
	}
}

func (h *hardUse) removeContainer(ctx context.Context, e *daemon.Engine) error {
	h.mu.Lock()
	var id string
	if len(h.containers) > 0 {
		id = h.containers[0]
	}
	h.mu.Unlock()
	if id == "" {
		return nil
	}
	err := e.RemoveContainer(ctx, id)
	if err == nil {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.containers = slices.DeleteFunc(h.containers, func(c string) bool { return c == id })
	}
	return err
}
