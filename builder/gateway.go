package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	fstypes "github.com/tonistiigi/fsutil/types"

	"varve.dev/errdefs"
	"varve.dev/layer"
)

// gateway is what the frontend sees of the build.
type gateway struct{ s *session }

var _ gwclient.Client = (*gateway)(nil)

// withheld are capabilities of LLB that this solver has not: the frontend then
// does without.
var withheld = []apicaps.CapID{pb.CapPassthroughOp}

// BuildOpts tells the frontend what was asked for and what can be done.
func (g *gateway) BuildOpts() gwclient.BuildOpts {
	caps := pb.Caps.CapSet(llbCaps())
	return gwclient.BuildOpts{
		Opts: g.s.options(), SessionID: "varve", Product: "varve",
		Workers: []gwclient.WorkerInfo{{ID: "varve", Platforms: []ocispec.Platform{g.s.platform}}},
		LLBCaps: caps, Caps: gwpb.Caps.CapSet(gwpb.Caps.All()),
	}
}

func llbCaps() []*apicaps.PBCap {
	var out []*apicaps.PBCap
next:
	for _, c := range pb.Caps.All() {
		for _, w := range withheld {
			if c.ID == string(w) {
				continue next
			}
		}
		out = append(out, c)
	}
	return out
}

// Solve makes references to the results of a definition. They are worked out
// when somebody looks into them.
func (g *gateway) Solve(ctx context.Context, req gwclient.SolveRequest) (*gwclient.Result, error) {
	if req.Frontend != "" {
		return nil, fmt.Errorf("frontend %q cannot be run from another one here: %w", req.Frontend, errdefs.ErrNotImplemented)
	}
	res := gwclient.NewResult()
	if req.Definition == nil || len(req.Definition.Def) == 0 {
		return res, nil
	}
	graph, err := loadGraph(req.Definition)
	if err != nil {
		return nil, err
	}
	ref := &reference{s: g.s, graph: graph, def: req.Definition}
	if req.Evaluate {
		if err := ref.Evaluate(ctx); err != nil {
			return nil, err
		}
	}
	res.SetRef(ref)
	return res, nil
}

// ResolveImageConfig finds a base image's digest and config.
func (g *gateway) ResolveImageConfig(ctx context.Context, ref string, opt sourceresolver.Opt) (string, digest.Digest, []byte, error) {
	platform := g.s.platform
	if opt.ImageOpt != nil && opt.ImageOpt.Platform != nil {
		platform = *opt.ImageOpt.Platform
	}
	d, config, err := g.s.resolve(ctx, ref, platform)
	return ref, d, config, err
}

// ResolveSourceMetadata is ResolveImageConfig in its newer form.
func (g *gateway) ResolveSourceMetadata(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt) (*sourceresolver.MetaResponse, error) {
	ref, ok := cutScheme(op.Identifier, schemeImage)
	if !ok {
		return &sourceresolver.MetaResponse{Op: op}, nil
	}
	_, d, config, err := g.ResolveImageConfig(ctx, ref, opt)
	if err != nil {
		return nil, err
	}
	return &sourceresolver.MetaResponse{Op: op, Image: &sourceresolver.ResolveImageResponse{Digest: d, Config: config}}, nil
}

// Inputs are other builds' results handed in; there are none.
func (g *gateway) Inputs(context.Context) (map[string]llb.State, error) { return nil, nil }

// NewContainer would run something for the frontend itself.
func (g *gateway) NewContainer(context.Context, gwclient.NewContainerRequest) (gwclient.Container, error) {
	return nil, fmt.Errorf("containers for frontends: %w", errdefs.ErrNotImplemented)
}

// Warn passes a lint's warning on.
func (g *gateway) Warn(_ context.Context, _ digest.Digest, msg string, opts gwclient.WarnOpts) error {
	text := msg
	if opts.SourceInfo != nil && len(opts.Range) > 0 {
		text = fmt.Sprintf("%s:%d: %s", opts.SourceInfo.Filename, opts.Range[0].Start.Line, msg)
	}
	g.s.event(Event{ID: "warnings", State: Warned, Text: text})
	return nil
}

// reference is the result of a definition, solved when it is wanted.
type reference struct {
	s     *session
	graph *graph
	def   *pb.Definition
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

// Evaluate solves the definition.
func (r *reference) Evaluate(ctx context.Context) error {
	_, err := r.s.solve(ctx, r.graph, r.graph.root)
	return err
}

// localDir tells whether the reference is the build context (or a named part
// of it) itself, which is read where it is.
func (r *reference) localDir() (*pb.SourceOp, bool) {
	v := r.graph.vertices[r.graph.root.vertex]
	src := v.op.GetSource()
	if src == nil {
		return nil, false
	}
	_, ok := cutScheme(src.Identifier, schemeLocal)
	return src, ok
}

// ReadFile reads a file of the result.
func (r *reference) ReadFile(ctx context.Context, req gwclient.ReadRequest) ([]byte, error) {
	f, err := r.open(ctx, req.Filename)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if req.Range != nil {
		length := int64(req.Range.Length)
		if length == 0 {
			length = maxFrontendFile
		}
		return io.ReadAll(io.NewSectionReader(f, int64(req.Range.Offset), length))
	}
	return io.ReadAll(io.LimitReader(f, maxFrontendFile))
}

// maxFrontendFile bounds what the frontend reads into memory at once: a
// Dockerfile, an ignore file.
const maxFrontendFile = 16 << 20

func (r *reference) open(ctx context.Context, name string) (*os.File, error) {
	if src, ok := r.localDir(); ok {
		return r.s.openLocal(src, name)
	}
	layers, err := r.layers(ctx)
	if err != nil {
		return nil, err
	}
	for _, l := range layers {
		root, err := os.OpenRoot(l.Dir)
		if err != nil {
			return nil, err
		}
		f, err := root.Open(relative(name))
		root.Close()
		if !errors.Is(err, os.ErrNotExist) {
			return f, err
		}
	}
	return nil, &os.PathError{Op: "open", Path: name, Err: os.ErrNotExist}
}

func (r *reference) layers(ctx context.Context) ([]layer.Parent, error) {
	key, err := r.s.solve(ctx, r.graph, r.graph.root)
	if err != nil || key == "" {
		return nil, err
	}
	return r.s.b.Snaps.Layers(ctx, key)
}

// relative makes a path of the container one in a directory.
func relative(name string) string {
	rel := filepath.Clean("/" + name)[1:]
	if rel == "" {
		return "."
	}
	return rel
}

// StatFile describes a file of the result.
func (r *reference) StatFile(ctx context.Context, req gwclient.StatRequest) (*fstypes.Stat, error) {
	f, err := r.open(ctx, req.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return statOf(req.Path, fi), nil
}

func statOf(name string, fi os.FileInfo) *fstypes.Stat {
	return &fstypes.Stat{Path: name, Mode: uint32(fi.Mode()), Size: fi.Size(), ModTime: fi.ModTime().UnixNano()}
}

// ReadDir lists a directory of the build context.
func (r *reference) ReadDir(ctx context.Context, req gwclient.ReadDirRequest) ([]*fstypes.Stat, error) {
	f, err := r.open(ctx, req.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return nil, err
	}
	var out []*fstypes.Stat
	for _, e := range entries {
		if req.IncludePattern != "" {
			if ok, err := filepath.Match(req.IncludePattern, e.Name()); err != nil || !ok {
				continue
			}
		}
		fi, err := e.Info()
		if err != nil {
			return nil, err
		}
		out = append(out, statOf(e.Name(), fi))
	}
	return out, nil
}
