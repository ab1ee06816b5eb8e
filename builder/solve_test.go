package builder

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/client/llb"

	"varve.dev/durable"
	"varve.dev/layout"
)

// TestFailureIsToldNotTheCallingOff has a step fail beside one that something
// else waits for as well: what is told is the failure.
func TestFailureIsToldNotTheCallingOff(t *testing.T) {
	durable.OnPoint(func(point string) {
		if point == layout.PointActiveMade {
			time.Sleep(5 * time.Millisecond)
		}
	})
	defer durable.OnPoint(nil)
	for range 20 {
		b := newBuilder(t)
		shared := scratch()
		for range 8 {
			shared = shared.File(file("/a", ""))
		}
		fails := llb.Scratch().File(llb.Copy(scratch(file("/x", "")), "/missing", "/"))
		// What has failed is told through many steps, the calling off through one.
		failed := llb.Merge([]llb.State{fails, shared})
		for range 20 {
			failed = failed.File(file("/b", ""))
		}
		g := loaded(t, llb.Merge([]llb.State{shared.File(file("/e", "")), failed}))
		_, err := begun(t, b).solve(t.Context(), g, g.root)
		if err == nil || errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "/missing") {
			t.Fatalf("a copy of what is missing: %v", err)
		}
	}
}
