package image

import (
	"context"
	"errors"
	"net/http"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// stuckAuthorizer answers everything with its error, as containerd's does
// after a request for a token was cancelled.
type stuckAuthorizer struct{ err error }

func (s stuckAuthorizer) Authorize(context.Context, *http.Request) error       { return s.err }
func (s stuckAuthorizer) AddResponses(context.Context, []*http.Response) error { return s.err }

// TestAuthorizerForgets: what failed for one operation is not the answer for
// the next, and a wait for the turn ends with its context.
func TestAuthorizerForgets(t *testing.T) {
	made := []error{context.Canceled, nil}
	a := newAuthorizer(func() docker.Authorizer {
		next := stuckAuthorizer{made[0]}
		made = made[1:]
		return next
	})
	if err := a.Authorize(t.Context(), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("first: %v", err)
	}
	if err := a.Authorize(t.Context(), nil); err != nil {
		t.Errorf("second: %v", err)
	}
	if err := a.turn.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.Authorize(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("while another has the turn: %v", err)
	}
}
