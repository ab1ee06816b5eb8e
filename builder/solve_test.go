package builder

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/client/llb"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/session"

	"varve.dev/durable"
	"varve.dev/errdefs"
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

// unreachable is a client that does not answer.
type unreachable struct{ err error }

func (u unreachable) ID() string { return "" }

func (u unreachable) Caller(context.Context, string) (session.Caller, error) { return nil, u.err }

// A frontend hears at once that the client's files did not come, since it may
// take those that it cannot read for files that are not there. It can do without
// a directory that the client has not.
func TestFilesThatDoNotCome(t *testing.T) {
	b := newBuilder(t)
	def, err := llb.Local("context").Marshal(t.Context(), llb.LinuxAmd64)
	if err != nil {
		t.Fatal(err)
	}
	for why, want := range map[error]error{errdefs.ErrUnavailable: errdefs.ErrUnavailable, errdefs.ErrNotFound: nil} {
		j := begunFor(t, b, Request{Client: unreachable{why}})
		g := &gateway{j: j, trace: j.newTrace()}
		if _, err := g.Solve(t.Context(), gwclient.SolveRequest{Definition: def.ToPB()}); !errors.Is(err, want) {
			t.Errorf("%v: the frontend is told %v", why, err)
		}
	}
}
