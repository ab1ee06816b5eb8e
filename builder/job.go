package builder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"github.com/containerd/platforms"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/runtime"
)

// job is one Build.
type job struct {
	b        *Builder
	req      Request
	platform ocispec.Platform // of this host
	lease    *metadata.Lease
	progress *progress
	solving  flights // of vertices
	granted  []string

	mu       sync.Mutex // guards the rest
	memo     map[digest.Digest]result
	keys     map[digest.Digest]string // definition keys, as far as they were worked out
	resolved map[string]resolved
	sources  map[digest.Digest]*source
	gitNames map[string]gitAt // what names in repositories stand for
	cleanups []func()
	views    []viewOf
	did      map[string]bool
	imports  []*cacheImport
	inline   bool // images get their cache into their configs
}

// begin makes what one build needs; end gives it back.
func (b *Builder) begin(ctx context.Context, req Request) (*job, error) {
	j := &job{
		b: b, req: req, platform: platforms.Normalize(platforms.DefaultSpec()), lease: b.DB.NewLease("build"),
		progress: newProgress(req.Progress), solving: newFlights(),
		memo: map[digest.Digest]result{}, keys: map[digest.Digest]string{}, resolved: map[string]resolved{}, sources: map[digest.Digest]*source{}, did: map[string]bool{}, gitNames: map[string]gitAt{},
	}
	for _, e := range req.Entitlements {
		if !slices.Contains(b.Entitlements, e) {
			return nil, fmt.Errorf("entitlement %s is not allowed: %w", e, errdefs.ErrPermissionDenied)
		}
		j.granted = append(j.granted, e)
	}
	j.importCaches(req.CacheFrom)
	return j, j.lease.Make(ctx)
}

// once tells whether this is the first time in this build.
func (j *job) once(what string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	first := !j.did[what]
	j.did[what] = true
	return first
}

// atEnd has fn called when the build is over.
func (j *job) atEnd(fn func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.cleanups = append(j.cleanups, fn)
}

func (j *job) end() {
	for _, fn := range j.cleanups {
		fn()
	}
	_ = j.lease.Release(context.Background())
	j.b.Journal.Kick()
	j.b.Space.Kick()
}

// evaluate solves all that a result refers to.
func (j *job) evaluate(ctx context.Context, res *gwclient.Result) error {
	if res == nil {
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	_ = res.EachRef(func(r gwclient.Reference) error {
		if ref, ok := r.(*reference); ok && ref == nil {
			return nil
		}
		group.Go(func() error { return r.Evaluate(ctx) })
		return nil
	})
	return group.Wait()
}

// caller is the session with an id, or the build's own.
func (j *job) caller(ctx context.Context, id string) (session.Caller, error) {
	if j.req.Client == nil {
		return nil, fmt.Errorf("nobody is there to ask for local files, secrets or agents: %w", errdefs.ErrNotFound)
	}
	return j.req.Client.Caller(ctx, id)
}

func (j *job) sessionID() string {
	if j.req.Client == nil {
		return ""
	}
	return j.req.Client.ID()
}

// executor runs steps.
func (b *Builder) executor() (*runtime.Executor, error) {
	shim, err := b.Shim()
	if err != nil {
		return nil, err
	}
	return &runtime.Executor{Shim: shim, Dir: b.Scratch}, nil
}

// explain gives an error of the frontend a kind.
func explain(err error) error {
	switch {
	case err == nil || errdefs.Has(err) || grpcerrors.Code(err) != codes.Unknown:
		return err
	case errors.Is(err, os.ErrNotExist):
		return &kindError{err, errdefs.ErrNotFound}
	}
	return &kindError{err, errdefs.ErrInvalidArgument}
}

// kindError is an error of a kind that its text does not name.
type kindError struct{ err, kind error }

func (e *kindError) Error() string   { return e.err.Error() }
func (e *kindError) Unwrap() []error { return []error{e.err, e.kind} }

// hold keeps snapshots until the build ends. Errors: ErrNotFound for one that
// was removed before.
func (j *job) hold(ctx context.Context, snaps []layout.SnapshotKey) error {
	return j.lease.Hold(ctx, func(tx *metadata.Tx) ([]layout.Node, error) { return nodesOf(tx, snaps) })
}
