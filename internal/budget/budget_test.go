package budget

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"varve.dev/errdefs"
)

// bounded has so many bytes, some of which can be freed.
type bounded struct {
	mu    sync.Mutex
	cap   int64
	loose int64 // taken, and to be had back
}

func (r *bounded) Short(claimed, _, extra int64) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return claimed + r.loose + extra - r.cap
}

func (r *bounded) Free(_ context.Context, short int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.loose == 0 {
		return errors.New("there is nothing left to free")
	}
	r.loose -= min(r.loose, max(short, 1))
	return nil
}

func TestClaims(t *testing.T) {
	r := &bounded{cap: 10 << 20, loose: 4 << 20}
	b := New(r)
	ctx := t.Context()
	pull := b.Claim("pull it")
	if err := pull.Reserve(ctx, 11<<20); !errors.Is(err, errdefs.ErrResourceExhausted) || r.loose != 0 {
		t.Errorf("more than there is: %v, %d left to free", err, r.loose)
	}
	if err := pull.Reserve(ctx, 9<<20); err != nil {
		t.Fatal(err)
	}
	blob := b.Claim("blob")
	if err := blob.Write(Of(ctx, pull), 8<<20); err != nil {
		t.Error(err)
	}
	if claimed, written := b.Claimed(); claimed != 9<<20 || written != 8<<20 {
		t.Errorf("%d claimed, %d written", claimed, written)
	}
	// Beyond what was set aside, down to the last byte.
	if err := blob.Write(Of(ctx, pull), 2<<20); err != nil {
		t.Error(err)
	}
	if err := blob.Write(Of(ctx, pull), 1); !errors.Is(err, errdefs.ErrResourceExhausted) {
		t.Errorf("a byte too many: %v", err)
	}
	if last := b.Claim("last"); last.Try(1) {
		t.Error("a byte too many was granted")
	}
	blob.Release()
	blob.Release()
	pull.Release()
	if claimed, written := b.Claimed(); claimed != 0 || written != 0 {
		t.Errorf("%d claimed, %d written at the end", claimed, written)
	}
	var none *Budget
	c := none.Claim("anything")
	if err := errors.Join(c.Reserve(ctx, 1<<60), c.Write(Of(ctx, c), 1<<60)); err != nil {
		t.Error(err)
	}
	c.Unwrite(1)
	c.Release()
	r.loose = 4 << 20
	if last := b.Claim("last"); last.Try(7<<20) || r.loose != 4<<20 {
		t.Errorf("more than there is, %d left to free", r.loose)
	} else if !last.Try(6 << 20) {
		t.Error("what there is was not granted")
	}
}

// Whatever happens, never more is claimed than there is, and all of it comes
// back.
func TestNeverMoreThanThereIs(t *testing.T) {
	r := &bounded{cap: 64 << 20}
	b := New(r)
	var wg sync.WaitGroup
	for seed := range uint64(8) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, 7))
			for range 300 {
				of, c := b.Claim("operation"), b.Claim("part")
				ctx := t.Context()
				if of.Reserve(ctx, rnd.Int64N(16<<20)) == nil {
					ctx = Of(ctx, of)
				}
				for range 5 {
					if c.Write(ctx, rnd.Int64N(4<<20)) == nil && rnd.IntN(2) == 0 {
						c.Unwrite(rnd.Int64N(1 << 20))
					}
					if claimed, written := b.Claimed(); claimed > r.cap || written > claimed {
						t.Errorf("%d claimed, %d written", claimed, written)
					}
				}
				c.Release()
				of.Release()
			}
		})
	}
	wg.Wait()
	if claimed, written := b.Claimed(); claimed != 0 || written != 0 {
		t.Errorf("%d claimed, %d written at the end", claimed, written)
	}
}
