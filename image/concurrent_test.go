package image

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"varve.dev/internal/testkit"
)

// TestPullTogether: eight pulls of one image at once fetch each blob once, and
// one that is cancelled takes none of the others with it.
func TestPullTogether(t *testing.T) {
	testkit.NeedRoot(t)
	img := testkit.Awkward(t)
	o, proxy, ref := setup(t, img, "lib/awkward:1")
	proxy.SetRule(func(r *http.Request, _ int) testkit.Fault {
		if strings.Contains(r.URL.Path, "/blobs/") {
			return testkit.Fault{Delay: 5 * time.Millisecond}
		}
		return testkit.Fault{}
	})
	first, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			ctx := t.Context()
			if i == 0 {
				ctx = first
			}
			_, err := o.Pull(ctx, ref, PullOptions{})
			if err != nil && (i != 0 || !errors.Is(err, context.Canceled)) {
				t.Errorf("pull %d: %v", i, err)
			}
		})
	}
	time.Sleep(30 * time.Millisecond)
	cancel()
	wg.Wait()
	details, err := o.Inspect(t.Context(), ref.String())
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range details.Layers {
		if sent := proxy.Sent(l.Digest.String()); sent > 2*l.Size {
			t.Errorf("%d bytes were sent of layer %s, which has %d", sent, l.Digest, l.Size)
		}
	}
	if left := o.ingests(t); len(left) > 0 {
		t.Errorf("ingests are left: %v", left)
	}
}

// TestTurns: overlapping sets in opposite orders do not wait for each other
// forever, and a waiter ends with its context.
func TestTurns(t *testing.T) {
	turns := newTurns()
	a, b := digest.FromString("a"), digest.FromString("b")
	var wg sync.WaitGroup
	for i := range 50 {
		set := []digest.Digest{a, b, a}
		if i%2 == 0 {
			set = []digest.Digest{b, a}
		}
		wg.Go(func() {
			end, err := turns.take(t.Context(), set)
			if err != nil {
				t.Error(err)
				return
			}
			end()
			end() // twice is once
		})
	}
	wg.Wait()
	end, err := turns.take(t.Context(), []digest.Digest{b})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := turns.take(ctx, []digest.Digest{a, b}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	end()
	// The one that gave up let go of a.
	if _, err := turns.take(t.Context(), []digest.Digest{a, b}); err != nil {
		t.Error(err)
	}
}
