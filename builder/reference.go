package builder

import (
	"context"
	"strings"

	cacheutil "github.com/moby/buildkit/cache/util"
	"github.com/moby/buildkit/client/llb"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/pb"
	fstypes "github.com/tonistiigi/fsutil/types"

	"varve.dev/layout"
	"varve.dev/overlay"
)

// reference is the result of a definition, solved when it is wanted.
type reference struct {
	j     *job
	graph *graph
	def   *pb.Definition
	trace *trace // of the frontend that asked for it
}

var _ gwclient.Reference = (*reference)(nil)

// ToState lets the frontend build on the reference.
func (r *reference) ToState() (llb.State, error) {
	op, err := llb.NewDefinitionOp(r.def)
	if err != nil {
		return llb.State{}, err
	}
	return llb.NewState(op), nil
}

// Definition is what the reference is the result of.
func (r *reference) Definition() *pb.Definition { return r.def }

// Evaluate solves the definition.
func (r *reference) Evaluate(ctx context.Context) error {
	_, err := r.snapshot(ctx)
	return err
}

func (r *reference) snapshot(ctx context.Context) (layout.SnapshotKey, error) {
	return r.j.solve(ctx, r.graph, r.graph.root)
}

// look calls fn with the directory that the result is mounted at.
func (r *reference) look(ctx context.Context, fn func(dir string) error) error {
	key, err := r.snapshot(ctx)
	if err != nil {
		return err
	}
	var tree overlay.Tree
	if key != "" {
		if tree, err = r.j.b.Snaps.Tree(ctx, key); err != nil {
			return err
		}
	}
	return inMounts(r.j.b.Scratch, []overlay.Tree{tree}, func(dirs []string) error {
		return withoutDir(fn(dirs[0]), dirs[0])
	})
}

// withoutDir takes a mount point out of an error's text.
func withoutDir(err error, dir string) error {
	if err == nil || !strings.Contains(err.Error(), dir) {
		return err
	}
	return &textError{strings.ReplaceAll(err.Error(), dir, ""), err}
}

// textError is an error with another text.
type textError struct {
	text string
	err  error
}

func (e *textError) Error() string { return e.text }
func (e *textError) Unwrap() error { return e.err }

// maxFrontendFile bounds what a frontend reads into memory at once: a
// Dockerfile, an ignore file.
const maxFrontendFile = 16 << 20

// ReadFile reads a file of the result.
func (r *reference) ReadFile(ctx context.Context, req gwclient.ReadRequest) (data []byte, err error) {
	read := cacheutil.ReadRequest{Filename: req.Filename}
	if req.Range != nil {
		read.Range = &cacheutil.FileRange{Offset: req.Range.Offset, Length: req.Range.Length}
	}
	err = r.look(ctx, func(dir string) (err error) {
		data, err = cacheutil.ReadFile(ctx, dir, read, maxFrontendFile)
		return err
	})
	return data, err
}

// StatFile describes a file of the result.
func (r *reference) StatFile(ctx context.Context, req gwclient.StatRequest) (st *fstypes.Stat, err error) {
	err = r.look(ctx, func(dir string) (err error) {
		st, err = cacheutil.StatFile(ctx, dir, req.Path)
		return err
	})
	return st, err
}

// ReadDir lists a directory of the result.
func (r *reference) ReadDir(ctx context.Context, req gwclient.ReadDirRequest) (out []*fstypes.Stat, err error) {
	err = r.look(ctx, func(dir string) (err error) {
		out, err = cacheutil.ReadDir(ctx, dir, cacheutil.ReadDirRequest{Path: req.Path, IncludePattern: req.IncludePattern})
		return err
	})
	return out, err
}
