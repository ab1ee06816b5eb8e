package bridge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	pb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/solver/errdefs"
	solverpb "github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Bridge serves one frontend's view of a build.
type Bridge struct {
	pb.UnimplementedLLBBridgeServer
	client  gwclient.Client
	inputs  map[string]*solverpb.Definition
	llbCaps []*apicaps.PBCap

	mu         sync.Mutex
	refs       map[string]gwclient.Reference
	containers map[string]gwclient.Container
	result     *gwclient.Result
	err        error
	done       chan struct{} // closed when the frontend has returned
}

var _ pb.LLBBridgeServer = (*Bridge)(nil)

// New returns a bridge to a build. inputs are the definitions that were handed
// in; llbCaps what of LLB the build can do.
func New(client gwclient.Client, inputs map[string]*solverpb.Definition, llbCaps []*apicaps.PBCap) *Bridge {
	return &Bridge{
		client: client, inputs: inputs, llbCaps: llbCaps, refs: map[string]gwclient.Reference{},
		containers: map[string]gwclient.Container{}, done: make(chan struct{}),
	}
}

// Done is closed when the frontend has returned a result or an error.
func (b *Bridge) Done() <-chan struct{} { return b.done }

// Result is what the frontend returned.
func (b *Bridge) Result() (*gwclient.Result, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.result == nil && b.err == nil {
		return nil, errors.New("no result for incomplete build")
	}
	return b.result, b.err
}

// Close releases what the frontend left.
func (b *Bridge) Close() {
	b.mu.Lock()
	left := b.containers
	b.containers = map[string]gwclient.Container{}
	b.mu.Unlock()
	for _, c := range left {
		_ = c.Release(context.Background())
	}
}

// Ping tells what can be done.
func (b *Bridge) Ping(context.Context, *pb.PingRequest) (*pb.PongResponse, error) {
	out := &pb.PongResponse{FrontendAPICaps: pb.Caps.All(), LLBCaps: b.llbCaps}
	for _, w := range b.client.BuildOpts().Workers {
		out.Workers = append(out.Workers, &apitypes.WorkerRecord{ID: w.ID, Labels: w.Labels, Platforms: solverpb.PlatformsFromSpec(w.Platforms)})
	}
	return out, nil
}

// Inputs are the definitions that were handed in.
func (b *Bridge) Inputs(context.Context, *pb.InputsRequest) (*pb.InputsResponse, error) {
	return &pb.InputsResponse{Definitions: b.inputs}, nil
}

// Warn passes a warning on.
func (b *Bridge) Warn(ctx context.Context, req *pb.WarnRequest) (*pb.WarnResponse, error) {
	for _, r := range req.Ranges {
		if r == nil {
			return nil, status.Error(codes.InvalidArgument, "invalid source range")
		}
	}
	return &pb.WarnResponse{}, b.client.Warn(ctx, digest.Digest(req.Digest), string(req.Short), gwclient.WarnOpts{
		Level: int(req.Level), SourceInfo: req.Info, Range: req.Ranges, Detail: req.Detail, URL: req.Url,
	})
}

// definer is a reference that knows what it is the result of.
type definer interface{ Definition() *solverpb.Definition }

// keep hands a reference out.
func (b *Bridge) keep(ref gwclient.Reference) *pb.Ref {
	if ref == nil {
		return &pb.Ref{}
	}
	id := identity.NewID()
	b.mu.Lock()
	b.refs[id] = ref
	b.mu.Unlock()
	out := &pb.Ref{Id: id}
	if d, ok := ref.(definer); ok {
		out.Def = d.Definition()
	}
	return out
}

// ref finds a reference that was handed out; nil for "".
func (b *Bridge) ref(id string) (gwclient.Reference, error) {
	if id == "" {
		return nil, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if r, ok := b.refs[id]; ok {
		return r, nil
	}
	return nil, fmt.Errorf("no such ref: %s", id)
}

// there is ref, for one that must not be empty.
func (b *Bridge) there(id string) (gwclient.Reference, error) {
	r, err := b.ref(id)
	if err == nil && r == nil {
		err = fmt.Errorf("empty ref: %q", id)
	}
	return r, err
}

// Solve makes references.
func (b *Bridge) Solve(ctx context.Context, req *pb.SolveRequest) (*pb.SolveResponse, error) {
	ask := gwclient.SolveRequest{
		Evaluate: req.Evaluate, Definition: req.Definition, Frontend: req.Frontend, FrontendOpt: req.FrontendOpt,
		FrontendInputs: req.FrontendInputs, SourcePolicies: req.SourcePolicies,
	}
	for _, e := range req.CacheImports {
		if e == nil {
			return nil, status.Error(codes.InvalidArgument, "invalid nil cache import")
		}
		ask.CacheImports = append(ask.CacheImports, gwclient.CacheOptionsEntry{Type: e.Type, Attrs: e.Attrs})
	}
	res, err := b.client.Solve(ctx, ask)
	if err != nil {
		return nil, errdefs.WithSolveError(err, nil, nil, nil)
	}
	if len(res.Refs) > 0 && !req.AllowResultReturn {
		return nil, status.Error(codes.InvalidArgument, "solve did not return default result")
	}
	out := &pb.Result{Metadata: res.Metadata}
	answer := &pb.SolveResponse{Result: out}
	if res.Refs != nil {
		refs := map[string]*pb.Ref{}
		for k, r := range res.Refs {
			refs[k] = b.keep(r)
		}
		if req.AllowResultArrayRef {
			out.Result = &pb.Result_Refs{Refs: &pb.RefMap{Refs: refs}}
		} else {
			ids := map[string]string{}
			for k, r := range refs {
				ids[k] = r.Id
			}
			out.Result = &pb.Result_RefsDeprecated{RefsDeprecated: &pb.RefMapDeprecated{Refs: ids}}
		}
	} else {
		r := b.keep(res.Ref)
		if req.AllowResultArrayRef {
			out.Result = &pb.Result_Ref{Ref: r}
		} else {
			out.Result = &pb.Result_RefDeprecated{RefDeprecated: r.Id}
		}
		if !req.AllowResultReturn {
			answer.Ref = r.Id
		}
	}
	for k, list := range res.Attestations {
		for _, a := range list {
			p, err := gwclient.AttestationToPB(&a)
			if err != nil {
				return nil, err
			}
			if a.Ref != nil {
				p.Ref = b.keep(a.Ref)
			}
			if out.Attestations == nil {
				out.Attestations = map[string]*pb.Attestations{}
			}
			if out.Attestations[k] == nil {
				out.Attestations[k] = &pb.Attestations{}
			}
			out.Attestations[k].Attestation = append(out.Attestations[k].Attestation, p)
		}
	}
	return answer, b.final(req, res)
}

// final takes a result that is returned with the call that asks for it, as old
// frontends do.
func (b *Bridge) final(req *pb.SolveRequest, res *gwclient.Result) error {
	if !req.Final {
		return nil
	}
	metadata := map[string][]byte{}
	if len(req.ExporterAttr) > 0 {
		if err := json.Unmarshal(req.ExporterAttr, &metadata); err != nil {
			return status.Errorf(codes.InvalidArgument, "exporter attributes: %v", err)
		}
	}
	for k, v := range res.Metadata {
		metadata[k] = v
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.result = &gwclient.Result{Ref: res.Ref, Metadata: metadata}
	return nil
}

// Return takes what the frontend comes to.
func (b *Bridge) Return(_ context.Context, req *pb.ReturnRequest) (*pb.ReturnResponse, error) {
	if req.Error != nil {
		return &pb.ReturnResponse{}, b.finish(nil, grpcerrors.FromGRPC(status.ErrorProto(&spb.Status{
			Code: req.Error.Code, Message: req.Error.Message, Details: req.Error.Details,
		})))
	}
	if req.Result == nil {
		return nil, status.Error(codes.InvalidArgument, "result is required")
	}
	res := gwclient.NewResult()
	res.Metadata = req.Result.Metadata
	add := func(key, id string) error {
		r, err := b.ref(id)
		if err == nil {
			res.AddRef(key, r)
		}
		return err
	}
	var err error
	switch x := req.Result.Result.(type) {
	case *pb.Result_RefDeprecated:
		res.Ref, err = b.ref(x.RefDeprecated)
	case *pb.Result_Ref:
		res.Ref, err = b.ref(x.Ref.GetId())
	case *pb.Result_RefsDeprecated:
		for k, id := range x.RefsDeprecated.Refs {
			err = errors.Join(err, add(k, id))
		}
	case *pb.Result_Refs:
		for k, r := range x.Refs.Refs {
			err = errors.Join(err, add(k, r.GetId()))
		}
	}
	if err != nil {
		return nil, err
	}
	for k, list := range req.Result.Attestations {
		for _, p := range list.Attestation {
			a, err := gwclient.AttestationFromPB[gwclient.Reference](p)
			if err != nil {
				return nil, err
			}
			if p.Ref != nil {
				if a.Ref, err = b.ref(p.Ref.Id); err != nil {
					return nil, err
				}
			}
			res.AddAttestation(k, *a)
		}
	}
	return &pb.ReturnResponse{}, b.finish(res, nil)
}

func (b *Bridge) finish(res *gwclient.Result, err error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.result != nil || b.err != nil {
		return status.Error(codes.FailedPrecondition, "gateway result is already set")
	}
	b.result, b.err = res, err
	close(b.done)
	return nil
}

// Fail ends the bridge with an error, unless the frontend returned something.
func (b *Bridge) Fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		b.result, b.err = nil, err
	}
}

// Evaluate solves a reference.
func (b *Bridge) Evaluate(ctx context.Context, req *pb.EvaluateRequest) (*pb.EvaluateResponse, error) {
	r, err := b.there(req.Ref)
	if err == nil {
		err = solveError(r.Evaluate(ctx))
	}
	return &pb.EvaluateResponse{}, err
}

// solveError lets the frontend know that it is the build that failed.
func solveError(err error) error {
	if err == nil {
		return nil
	}
	return errdefs.WithSolveError(err, nil, nil, nil)
}

// ReadFile reads a file of a reference.
func (b *Bridge) ReadFile(ctx context.Context, req *pb.ReadFileRequest) (*pb.ReadFileResponse, error) {
	r, err := b.there(req.Ref)
	if err != nil {
		return nil, err
	}
	data, err := r.ReadFile(ctx, gwclient.ReadRequest{Filename: req.FilePath, Range: rangeOf(req.Range)})
	return &pb.ReadFileResponse{Data: data}, solveError(err)
}

func rangeOf(r *pb.FileRange) *gwclient.FileRange {
	if r == nil {
		return nil
	}
	return &gwclient.FileRange{Offset: int(r.Offset), Length: int(r.Length)}
}

// ReadDir lists a directory of a reference.
func (b *Bridge) ReadDir(ctx context.Context, req *pb.ReadDirRequest) (*pb.ReadDirResponse, error) {
	r, err := b.there(req.Ref)
	if err != nil {
		return nil, err
	}
	entries, err := r.ReadDir(ctx, gwclient.ReadDirRequest{Path: req.DirPath, IncludePattern: req.IncludePattern})
	return &pb.ReadDirResponse{Entries: entries}, solveError(err)
}

// StatFile describes a file of a reference.
func (b *Bridge) StatFile(ctx context.Context, req *pb.StatFileRequest) (*pb.StatFileResponse, error) {
	r, err := b.there(req.Ref)
	if err != nil {
		return nil, err
	}
	st, err := r.StatFile(ctx, gwclient.StatRequest{Path: req.Path})
	return &pb.StatFileResponse{Stat: st}, err
}

// ResolveImageConfig finds an image.
func (b *Bridge) ResolveImageConfig(ctx context.Context, req *pb.ResolveImageConfigRequest) (*pb.ResolveImageConfigResponse, error) {
	opt := sourceresolver.Opt{LogName: req.LogName, SourcePolicies: req.SourcePolicies}
	if sourceresolver.ResolverType(req.ResolverType) == sourceresolver.ResolverTypeOCILayout {
		opt.OCILayoutOpt = &sourceresolver.ResolveOCILayoutOpt{
			Store: sourceresolver.ResolveImageConfigOptStore{SessionID: req.SessionID, StoreID: req.StoreID}, Platform: platform(req.Platform),
		}
	} else {
		opt.ImageOpt = &sourceresolver.ResolveImageOpt{ResolveMode: req.ResolveMode, Platform: platform(req.Platform)}
	}
	ref, d, config, err := b.client.ResolveImageConfig(ctx, req.Ref, opt)
	if err != nil {
		return nil, err
	}
	return &pb.ResolveImageConfigResponse{Ref: ref, Digest: d.String(), Config: config}, nil
}

func platform(p *solverpb.Platform) *ocispec.Platform {
	if p == nil {
		return nil
	}
	return &ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant, OSVersion: p.OSVersion, OSFeatures: p.OSFeatures}
}

// ResolveSourceMeta finds out what a source is at the moment.
func (b *Bridge) ResolveSourceMeta(ctx context.Context, req *pb.ResolveSourceMetaRequest) (*pb.ResolveSourceMetaResponse, error) {
	if req.Source == nil {
		return nil, status.Error(codes.InvalidArgument, "source is required")
	}
	p := platform(req.Platform)
	opt := sourceresolver.Opt{
		LogName: req.LogName, SourcePolicies: req.SourcePolicies,
		ImageOpt:     &sourceresolver.ResolveImageOpt{ResolveMode: req.ResolveMode, Platform: p},
		OCILayoutOpt: &sourceresolver.ResolveOCILayoutOpt{Platform: p},
	}
	if req.Image != nil {
		opt.ImageOpt.NoConfig = req.Image.NoConfig
		opt.ImageOpt.AttestationChain = req.Image.AttestationChain
		opt.ImageOpt.ResolveAttestations = req.Image.ResolveAttestations
	}
	if req.Git != nil {
		opt.GitOpt = &sourceresolver.ResolveGitOpt{ReturnObject: req.Git.ReturnObject}
	}
	if req.HTTP != nil && req.HTTP.ChecksumRequest != nil {
		opt.HTTPOpt = &sourceresolver.ResolveHTTPOpt{ChecksumReq: &sourceresolver.ResolveHTTPChecksumRequest{
			Algo: checksumAlgo(req.HTTP.ChecksumRequest.Algo), Suffix: req.HTTP.ChecksumRequest.Suffix,
		}}
	}
	m, err := b.client.ResolveSourceMetadata(ctx, req.Source, opt)
	if err != nil {
		return nil, err
	}
	return metaResponse(m), nil
}

func checksumAlgo(a pb.ChecksumRequest_ChecksumAlgo) sourceresolver.ResolveHTTPChecksumAlgo {
	switch a {
	case pb.ChecksumRequest_CHECKSUM_ALGO_SHA384:
		return sourceresolver.ResolveHTTPChecksumAlgoSHA384
	case pb.ChecksumRequest_CHECKSUM_ALGO_SHA512:
		return sourceresolver.ResolveHTTPChecksumAlgoSHA512
	}
	return sourceresolver.ResolveHTTPChecksumAlgoSHA256
}

func metaResponse(m *sourceresolver.MetaResponse) *pb.ResolveSourceMetaResponse {
	out := &pb.ResolveSourceMetaResponse{Source: m.Op}
	if i := m.Image; i != nil {
		out.Image = &pb.ResolveSourceImageResponse{Digest: i.Digest.String(), Config: i.Config}
	}
	if g := m.Git; g != nil {
		out.Git = &pb.ResolveSourceGitResponse{
			Checksum: g.Checksum, Ref: g.Ref, CommitChecksum: g.CommitChecksum, CommitObject: g.CommitObject, TagObject: g.TagObject,
		}
	}
	if h := m.HTTP; h != nil {
		out.HTTP = &pb.ResolveSourceHTTPResponse{Checksum: h.Digest.String(), Filename: h.Filename}
		if h.LastModified != nil {
			out.HTTP.LastModified = &timestamppb.Timestamp{Seconds: h.LastModified.Unix()}
		}
		if c := h.ChecksumResponse; c != nil {
			out.HTTP.ChecksumResponse = &pb.ChecksumResponse{Digest: c.Digest, Suffix: c.Suffix}
		}
	}
	return out
}
