package image

import (
	"context"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
)

// turns lets operations that bring the same blobs go one after the other.
// A turn is a reservation, not a lock around I/O: whoever waits for it waits
// with its context, and the one who has it is bounded by its own.
type turns struct {
	mu    *sync.Mutex
	taken map[digest.Digest]chan struct{} // closed when the turn is over
}

func newTurns() turns {
	return turns{new(sync.Mutex), map[digest.Digest]chan struct{}{}}
}

// take waits until nobody else brings one of the blobs, and returns the end
// of the turn. Digests are taken in their order, so two operations never wait
// for each other.
func (t *turns) take(ctx context.Context, blobs []digest.Digest) (end func(), err error) {
	blobs = slices.Compact(slices.Sorted(slices.Values(blobs)))
	var mine []digest.Digest
	end = sync.OnceFunc(func() { t.give(mine) })
	for _, d := range blobs {
		if err := t.one(ctx, d); err != nil {
			end()
			return nil, err
		}
		mine = append(mine, d)
	}
	return end, nil
}

func (t *turns) one(ctx context.Context, d digest.Digest) error {
	for {
		t.mu.Lock()
		over, busy := t.taken[d]
		if !busy {
			t.taken[d] = make(chan struct{})
			t.mu.Unlock()
			return nil
		}
		t.mu.Unlock()
		select {
		case <-over:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (t *turns) give(blobs []digest.Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range blobs {
		close(t.taken[d])
		delete(t.taken, d)
	}
}
