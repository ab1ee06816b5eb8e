package image

import (
	"context"
	"net/http"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// authorizer is containerd's, made safe to share between operations and to
// keep. By itself it waits for another's token without a context, remembers a
// failed request for one (that of a cancelled pull, too) as the answer for
// everybody, and reads a token's lifetime while it is written.
//
// Requests for tokens of one registry go one after the other, each bounded by
// its context and the guard; after a failure everything is forgotten.
type authorizer struct {
	fresh func() docker.Authorizer
	turn  slots // of one
	inner docker.Authorizer
}

func newAuthorizer(fresh func() docker.Authorizer) *authorizer {
	return &authorizer{fresh: fresh, turn: make(slots, 1), inner: fresh()}
}

// Authorize implements docker.Authorizer.
func (a *authorizer) Authorize(ctx context.Context, req *http.Request) error {
	return a.do(ctx, func() error { return a.inner.Authorize(ctx, req) })
}

// AddResponses implements docker.Authorizer.
func (a *authorizer) AddResponses(ctx context.Context, responses []*http.Response) error {
	return a.do(ctx, func() error { return a.inner.AddResponses(ctx, responses) })
}

func (a *authorizer) do(ctx context.Context, fn func() error) error {
	if err := a.turn.take(ctx); err != nil {
		return err
	}
	defer a.turn.give()
	err := fn()
	if err != nil {
		a.inner = a.fresh()
	}
	return err
}
