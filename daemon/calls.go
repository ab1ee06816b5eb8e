package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"varve.dev/api/varve"
)

// The calls of a varve.Backend, each in a term of its own.

var _ varve.Backend = (*Keeper)(nil)

// enter waits until the store is open, and returns the term, which the caller
// leaves, with a context that ends with it. Errors: of ctx; why the store is
// not open.
func (k *Keeper) enter(ctx context.Context) (t *term, inner context.Context, leave func(), err error) {
	for {
		k.mu.Lock()
		t, err, changed := k.term, k.err, k.changed
		if t != nil && t.ending() {
			t = nil
		}
		if t != nil {
			t.calls.Add(1)
		}
		k.mu.Unlock()
		if err != nil {
			return nil, nil, nil, err
		}
		if t == nil {
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return nil, nil, nil, ctx.Err()
			}
		}
		inner, cancel := context.WithCancel(ctx)
		stop := context.AfterFunc(t.ctx, cancel)
		return t, inner, func() { stop(); cancel(); t.calls.Done() }, nil
	}
}

// call makes a call in a term.
func call[R any](ctx context.Context, k *Keeper, fn func(context.Context, *Engine) (R, error)) (R, error) {
	t, inner, leave, err := k.enter(ctx)
	if err != nil {
		var none R
		return none, err
	}
	defer leave()
	r, err := fn(inner, t.engine)
	// Whatever was wrong, it may not be once the database is made anew.
	if err != nil && ctx.Err() == nil && t.damaged() {
		err = fmt.Errorf("%w (it was: %s)", varve.ErrReopened, firstLine(err))
	}
	return r, err
}

// do is call for what returns nothing.
func do(ctx context.Context, k *Keeper, fn func(context.Context, *Engine) error) error {
	_, err := call(ctx, k, func(ctx context.Context, e *Engine) (struct{}, error) { return struct{}{}, fn(ctx, e) })
	return err
}

// Root implements varve.Backend.
func (k *Keeper) Root(ctx context.Context) (string, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (string, error) { return e.Root(ctx) })
}

// Info implements varve.Backend.
func (k *Keeper) Info(ctx context.Context) (varve.Info, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (varve.Info, error) { return e.Info(ctx) })
}

// Fsck implements varve.Backend.
func (k *Keeper) Fsck(ctx context.Context, req varve.FsckRequest, progress func(varve.Event)) (varve.FsckReport, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (varve.FsckReport, error) { return e.Fsck(ctx, req, progress) })
}

// Quarantine implements varve.Backend.
func (k *Keeper) Quarantine(ctx context.Context) ([]varve.Quarantined, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) ([]varve.Quarantined, error) { return e.Quarantine(ctx) })
}

// Discard implements varve.Backend.
func (k *Keeper) Discard(ctx context.Context, ids []string) error {
	return do(ctx, k, func(ctx context.Context, e *Engine) error { return e.Discard(ctx, ids) })
}

// DiskUsage implements varve.Space.
func (k *Keeper) DiskUsage(ctx context.Context, req varve.DiskUsageRequest) (varve.DiskUsage, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (varve.DiskUsage, error) { return e.DiskUsage(ctx, req) })
}

// Collect implements varve.Space.
func (k *Keeper) Collect(ctx context.Context, req varve.CollectRequest) (varve.Collected, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (varve.Collected, error) { return e.Collect(ctx, req) })
}

// Prune implements varve.Space.
func (k *Keeper) Prune(ctx context.Context, req varve.PruneRequest, progress func(varve.Event)) (varve.Pruned, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (varve.Pruned, error) { return e.Prune(ctx, req, progress) })
}

// Pull implements varve.Images.
func (k *Keeper) Pull(ctx context.Context, req varve.PullRequest, progress func(varve.Event)) (varve.ImageSummary, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (varve.ImageSummary, error) { return e.Pull(ctx, req, progress) })
}

// Push implements varve.Images.
func (k *Keeper) Push(ctx context.Context, req varve.PushRequest, progress func(varve.Event)) (varve.PushResult, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (varve.PushResult, error) { return e.Push(ctx, req, progress) })
}

// Load implements varve.Images.
func (k *Keeper) Load(ctx context.Context, archive io.Reader, progress func(varve.Event)) ([]varve.ImageSummary, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) ([]varve.ImageSummary, error) {
		return e.Load(ctx, archive, progress)
	})
}

// Save implements varve.Images.
func (k *Keeper) Save(ctx context.Context, req varve.SaveRequest, w io.Writer) error {
	return do(ctx, k, func(ctx context.Context, e *Engine) error { return e.Save(ctx, req, w) })
}

// Tag implements varve.Images.
func (k *Keeper) Tag(ctx context.Context, req varve.TagRequest) error {
	return do(ctx, k, func(ctx context.Context, e *Engine) error { return e.Tag(ctx, req) })
}

// List implements varve.Images.
func (k *Keeper) List(ctx context.Context) ([]varve.ImageSummary, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) ([]varve.ImageSummary, error) { return e.List(ctx) })
}

// Remove implements varve.Images.
func (k *Keeper) Remove(ctx context.Context, req varve.RemoveRequest) (varve.RemoveResult, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (varve.RemoveResult, error) { return e.Remove(ctx, req) })
}

// Inspect implements varve.Images.
func (k *Keeper) Inspect(ctx context.Context, name string) (json.RawMessage, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (json.RawMessage, error) { return e.Inspect(ctx, name) })
}

// History implements varve.Images.
func (k *Keeper) History(ctx context.Context, name string) ([]varve.HistoryEntry, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) ([]varve.HistoryEntry, error) { return e.History(ctx, name) })
}

// Create implements varve.Containers.
func (k *Keeper) Create(ctx context.Context, req varve.CreateRequest, progress func(varve.Event)) (varve.Container, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (varve.Container, error) { return e.Create(ctx, req, progress) })
}

// Commit implements varve.Containers.
func (k *Keeper) Commit(ctx context.Context, req varve.CommitRequest) (varve.ImageSummary, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (varve.ImageSummary, error) { return e.Commit(ctx, req) })
}

// RemoveContainer implements varve.Containers.
func (k *Keeper) RemoveContainer(ctx context.Context, id string) error {
	return do(ctx, k, func(ctx context.Context, e *Engine) error { return e.RemoveContainer(ctx, id) })
}
