package journal_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"varve.dev/errdefs"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// TestDrainOfAPoisonedStore waits for deletions that fail, again and again: each
// wait ends with the reason, however soon the round that fails is over.
func TestDrainOfAPoisonedStore(t *testing.T) {
	s, err := teststore.Open(t.Context(), newStore(t))
	must(t, err)
	must(t, s.DB.Update(t.Context(), func(tx *metadata.Tx) error {
		return tx.Sweep(layout.LayerNode("gone"), layout.LayerPath("gone"), layout.Usage{})
	}))
	s.Root.Poison(errors.New("the disk said no"))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range 20_000 {
		if err := s.Journal.Drain(ctx); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	_ = errors.Join(s.Journal.Close(), s.DB.Close(), s.Root.Close())
}
