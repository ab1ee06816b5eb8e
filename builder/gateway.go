package builder

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	dockerfile "github.com/moby/buildkit/frontend/dockerfile/builder"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"

	"varve.dev/errdefs"
)

// gateway is what a frontend sees of the build.
type gateway struct {
	j      *job
	opts   map[string]string
	inputs map[string]*pb.Definition
	trace  *trace
}

var _ gwclient.Client = (*gateway)(nil)

// frontend returns one of the builder's own frontends.
func (j *job) frontend(name string) (gwclient.BuildFunc, error) {
	switch name {
	case "dockerfile.v0":
		return dockerfile.Build, nil
	case "gateway.v0":
		return j.external, nil
	}
	return nil, fmt.Errorf("frontend %q is not known here: %w", name, errdefs.ErrNotFound)
}

// withheld are capabilities of LLB that this solver has not: the frontend then
// does without.
var withheld = []apicaps.CapID{pb.CapPassthroughOp, pb.CapSourceGitSignatureVerify, pb.CapSourceGitBundle, pb.CapSourceGitCheckoutBundle}

// workerID names this builder to frontends, which know of several workers.
const workerID = "varve"

// BuildOpts tells the frontend what was asked for and what can be done.
func (g *gateway) BuildOpts() gwclient.BuildOpts {
	return gwclient.BuildOpts{
		Opts: maps.Clone(g.opts), SessionID: g.j.sessionID(), Product: "varve",
		Workers: []gwclient.WorkerInfo{{ID: workerID, Platforms: []ocispec.Platform{g.j.platform}}},
		LLBCaps: pb.Caps.CapSet(LLBCaps()), Caps: gwpb.Caps.CapSet(gwpb.Caps.All()),
	}
}

// LLBCaps are what of LLB the solver can do.
func LLBCaps() []*apicaps.PBCap {
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

// Solve makes references to the results of a definition, or has another
// frontend do so. They are worked out when somebody looks into them.
func (g *gateway) Solve(ctx context.Context, req gwclient.SolveRequest) (*gwclient.Result, error) {
	for _, c := range req.CacheImports {
		g.j.importCaches([]CacheOption{{Type: c.Type, Attrs: c.Attrs}})
	}
	if req.Frontend != "" {
		if req.Definition != nil && len(req.Definition.Def) > 0 {
			return nil, fmt.Errorf("a request for frontend %s has a definition of its own: %w", req.Frontend, errdefs.ErrInvalidArgument)
		}
		run, err := g.j.frontend(req.Frontend)
		if err != nil {
			return nil, err
		}
		below := g.trace.call(req.Frontend, req.FrontendOpt, req.FrontendInputs)
		res, err := run(ctx, &gateway{j: g.j, opts: orEmpty(req.FrontendOpt), inputs: req.FrontendInputs, trace: below})
		if err == nil {
			g.trace.came(below, res)
		}
		if err == nil && req.Evaluate {
			err = g.j.evaluate(ctx, res)
		}
		return res, err
	}
	res := gwclient.NewResult()
	if req.Definition == nil || len(req.Definition.Def) == 0 {
		return res, nil
	}
	graph, err := loadGraph(req.Definition)
	if err != nil {
		return nil, err
	}
	if err := g.j.applyPolicy(ctx, graph, req.SourcePolicies); err != nil {
		return nil, err
	}
	ref := g.trace.made(&reference{j: g.j, graph: graph, def: req.Definition})
	// The Dockerfile's frontend takes an ignore file that it cannot read for none.
	// That the client's files did not come must not look like that.
	if req.Evaluate || graph.isLocal() {
		if err := ref.Evaluate(ctx); err != nil && (req.Evaluate || !isMissing(err)) {
			return nil, err
		}
	}
	res.SetRef(ref)
	return res, nil
}

// isMissing tells whether an error says that the client has no such directory.
func isMissing(err error) bool {
	return errors.Is(err, errdefs.ErrNotFound) || grpcerrors.Code(err) == codes.NotFound
}

func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

// ResolveImageConfig finds a base image's digest and config.
func (g *gateway) ResolveImageConfig(ctx context.Context, ref string, opt sourceresolver.Opt) (string, digest.Digest, []byte, error) {
	return sourceresolver.NewImageMetaResolver(g).ResolveImageConfig(ctx, ref, opt)
}

// ResolveSourceMetadata finds out what a source is at the moment.
func (g *gateway) ResolveSourceMetadata(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt) (m *sourceresolver.MetaResponse, err error) {
	name := opt.LogName
	if name == "" {
		name = "resolve image config for " + op.Identifier
	}
	v := g.j.progress.own(name)
	g.j.progress.begin(v)
	defer func() { g.j.progress.end(v, err) }()
	if op, err = g.j.allowed(ctx, op, opt.SourcePolicies); err != nil {
		return nil, err
	}
	defer func() { g.trace.lookedUp(m, opt, err) }()
	m = &sourceresolver.MetaResponse{Op: op}
	if ref, ok := cutScheme(op.Identifier, schemeImage); ok {
		platform, mode := g.j.platform, op.Attrs[pb.AttrImageResolveMode]
		if o := opt.ImageOpt; o != nil {
			if o.Platform != nil {
				platform = *o.Platform
			}
			if o.ResolveMode != "" {
				mode = o.ResolveMode
			}
		}
		d, config, err := g.j.resolve(ctx, ref, platform, mode)
		m.Image = &sourceresolver.ResolveImageResponse{Digest: d, Config: config}
		return m, err
	}
	v.op = &pb.Op{Op: &pb.Op_Source{Source: op}}
	if _, ok := cutScheme(op.Identifier, schemeGit); ok {
		o, err := newGitOrigin(g.j, v, op)
		if err == nil {
			m.Git, err = o.metadata(ctx, opt.GitOpt)
		}
		return m, err
	}
	s, err := g.j.sourceOf(v, op)
	if err != nil {
		return nil, err
	}
	switch o := s.origin.(type) {
	case *httpOrigin:
		m.HTTP, err = o.metadata(ctx, opt.HTTPOpt)
	case *layoutOrigin:
		if opt.OCILayoutOpt != nil && opt.OCILayoutOpt.Platform != nil {
			o.platform = *opt.OCILayoutOpt.Platform
		}
		m.Image, err = o.metadata(ctx)
	}
	return m, err
}

// Inputs are other builds' results that were handed in.
func (g *gateway) Inputs(context.Context) (map[string]llb.State, error) {
	out := map[string]llb.State{}
	for name, def := range g.inputs {
		op, err := llb.NewDefinitionOp(def)
		if err != nil {
			return nil, fmt.Errorf("input %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		out[name] = llb.NewState(op)
	}
	return out, nil
}

// Definitions are the inputs as they are.
func (g *gateway) Definitions() map[string]*pb.Definition { return g.inputs }

// NewContainer would run something for the frontend itself.
func (g *gateway) NewContainer(context.Context, gwclient.NewContainerRequest) (gwclient.Container, error) {
	return nil, fmt.Errorf("containers for frontends: %w", errdefs.ErrNotImplemented)
}

// Warn passes a lint's warning on.
func (g *gateway) Warn(_ context.Context, d digest.Digest, msg string, opts gwclient.WarnOpts) error {
	g.j.progress.warn(&client.VertexWarning{
		Vertex: d, Level: opts.Level, Short: []byte(msg), Detail: opts.Detail, URL: opts.URL, SourceInfo: opts.SourceInfo, Range: opts.Range,
	})
	return nil
}
