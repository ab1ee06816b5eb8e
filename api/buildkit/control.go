package buildkit

import (
	"context"
	"fmt"
	"time"

	control "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/exptypes"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/grpchijack"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/timestamppb"

	"varve.dev/builder"
	"varve.dev/builder/bridge"
	"varve.dev/errdefs"
)

// Backend builds. Errors are of the kinds of package errdefs.
type Backend interface {
	// Solve carries a build out; its images are filled in.
	Solve(ctx context.Context, req builder.Request) (builder.Response, error)
	// CacheUsage lists what the build cache holds.
	CacheUsage(ctx context.Context) ([]client.UsageInfo, error)
	// PruneCache removes from the build cache and tells what went.
	PruneCache(ctx context.Context, req client.PruneInfo, gone func(client.UsageInfo)) error
	// Worker describes the builder.
	Worker() Worker
}

// Worker is what clients are told of the builder.
type Worker struct {
	ID        string
	Labels    map[string]string
	Platforms []ocispec.Platform
	Version   client.BuildkitVersion
}

// Server answers BuildKit's clients from a backend.
type Server struct {
	control.UnimplementedControlServer
	backend  Backend
	sessions *session.Manager
	builds   builds
}

// New returns a server.
func New(backend Backend) (*Server, error) {
	sessions, err := session.NewManager()
	if err != nil {
		return nil, fmt.Errorf("sessions: %w: %w", err, errdefs.ErrInternal)
	}
	return &Server{backend: backend, sessions: sessions, builds: newBuilds()}, nil
}

// Register adds the services to a gRPC server.
func (s *Server) Register(server *grpc.Server) {
	control.RegisterControlServer(server, s)
	s.registerGateway(server)
}

// Session makes a stream the connection to a client's session: from then on the
// server asks, and the client answers.
func (s *Server) Session(stream control.Control_SessionServer) error {
	conn, closed, opts := grpchijack.Hijack(stream)
	defer conn.Close()
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	go func() {
		<-closed
		cancel()
	}()
	return s.sessions.HandleConn(ctx, conn, opts)
}

// sessionClient finds the sessions of one build.
type sessionClient struct {
	sessions *session.Manager
	id       string
}

// sessionWait is how long a session may take to be there: its client opens it
// beside the request that names it.
const sessionWait = 5 * time.Second

func (c *sessionClient) ID() string { return c.id }

func (c *sessionClient) Caller(ctx context.Context, id string) (session.Caller, error) {
	if id == "" {
		id = c.id
	}
	if id == "" {
		return nil, fmt.Errorf("no active sessions: %w", errdefs.ErrNotFound)
	}
	wait, cancel := context.WithTimeout(ctx, sessionWait)
	defer cancel()
	caller, err := c.sessions.Get(wait, id, false)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("no active session for %s: %w", id, errdefs.ErrNotFound)
	}
	return caller, nil
}

// Solve carries a build out. Without a definition and a frontend, the client
// runs a frontend of its own, through the gateway service.
func (s *Server) Solve(ctx context.Context, req *control.SolveRequest) (*control.SolveResponse, error) {
	modernise(req)
	if req.Ref == "" {
		req.Ref = identity.NewID()
	}
	b, err := s.builds.begin(req)
	if err != nil {
		return nil, err
	}
	ask := builder.Request{
		Ref: req.Ref, Definition: req.Definition, Frontend: req.Frontend, Attrs: req.FrontendAttrs, Inputs: req.FrontendInputs,
		Entitlements: req.Entitlements, Policy: req.SourcePolicy, Client: &sessionClient{s.sessions, req.Session}, Progress: b.tell,
	}
	for _, e := range req.Exporters {
		ask.Exports = append(ask.Exports, builder.Export{Type: e.Type, Attrs: e.Attrs})
	}
	for _, e := range req.Cache.Exports {
		ask.CacheTo = append(ask.CacheTo, builder.CacheOption{Type: e.Type, Attrs: e.Attrs})
	}
	for _, e := range req.Cache.Imports {
		ask.CacheFrom = append(ask.CacheFrom, builder.CacheOption{Type: e.Type, Attrs: e.Attrs})
	}
	if req.Frontend == "" && req.Definition == nil {
		ask.Run = func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
			return s.runClient(ctx, req, c)
		}
	}
	res, err := s.backend.Solve(ctx, ask)
	s.builds.end(b, res.Exported)
	if err != nil {
		return nil, err
	}
	return &control.SolveResponse{ExporterResponse: res.Exported}, nil
}

// runClient waits for what the client's frontend returns.
func (s *Server) runClient(ctx context.Context, req *control.SolveRequest, c gwclient.Client) (*gwclient.Result, error) {
	b := bridge.New(c, req.FrontendInputs, builder.LLBCaps())
	defer b.Close()
	s.builds.open(req.Ref, b)
	defer s.builds.open(req.Ref, nil)
	select {
	case <-b.Done():
		return b.Result()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// modernise turns what old clients send into what new ones do.
func modernise(req *control.SolveRequest) {
	if req.Cache == nil {
		req.Cache = &control.CacheOptions{}
	}
	c := req.Cache
	if c.ExportRefDeprecated != "" {
		attrs := map[string]string{}
		for k, v := range c.ExportAttrsDeprecated {
			attrs[k] = v
		}
		attrs["ref"] = c.ExportRefDeprecated
		c.Exports = append(c.Exports, &control.CacheOptionsEntry{Type: "registry", Attrs: attrs})
	}
	for _, ref := range c.ImportRefsDeprecated {
		c.Imports = append(c.Imports, &control.CacheOptionsEntry{Type: "registry", Attrs: map[string]string{"ref": ref}})
	}
	if len(req.Exporters) == 0 && req.ExporterDeprecated != "" {
		req.Exporters = append(req.Exporters, &control.Exporter{Type: req.ExporterDeprecated, Attrs: req.ExporterAttrsDeprecated})
	}
	// What the frontend is told of SOURCE_DATE_EPOCH holds for exporters too.
	if epoch, ok := req.FrontendAttrs["build-arg:SOURCE_DATE_EPOCH"]; ok && builder.IsEpoch(epoch) {
		for _, e := range req.Exporters {
			if _, ok := e.Attrs[string(exptypes.OptKeySourceDateEpoch)]; !ok {
				if e.Attrs == nil {
					e.Attrs = map[string]string{}
				}
				e.Attrs[string(exptypes.OptKeySourceDateEpoch)] = epoch
			}
		}
	}
}

// timestampKey is the header that tells the client this host's time.
const timestampKey = "buildkit-current-timestamp"

func sendTime(stream grpc.ServerStream) error {
	return stream.SendHeader(metadata.Pairs(timestampKey, time.Now().Format(time.RFC3339Nano)))
}

// Status tells of a build's progress, from its beginning to its end.
func (s *Server) Status(req *control.StatusRequest, stream control.Control_StatusServer) error {
	if err := sendTime(stream); err != nil {
		return err
	}
	return s.builds.follow(stream.Context(), req.Ref, func(ss *client.SolveStatus) error {
		for _, m := range ss.Marshal() {
			if err := stream.Send(m); err != nil {
				return err
			}
		}
		return nil
	})
}

// ListWorkers describes the builder.
func (s *Server) ListWorkers(context.Context, *control.ListWorkersRequest) (*control.ListWorkersResponse, error) {
	w := s.backend.Worker()
	return &control.ListWorkersResponse{Record: []*apitypes.WorkerRecord{{
		ID: w.ID, Labels: w.Labels, Platforms: pb.PlatformsFromSpec(w.Platforms), BuildkitVersion: version(w.Version),
	}}}, nil
}

// Info tells the version.
func (s *Server) Info(context.Context, *control.InfoRequest) (*control.InfoResponse, error) {
	return &control.InfoResponse{BuildkitVersion: version(s.backend.Worker().Version)}, nil
}

func version(v client.BuildkitVersion) *apitypes.BuildkitVersion {
	return &apitypes.BuildkitVersion{Package: v.Package, Version: v.Version, Revision: v.Revision, DockerfileVersion: v.DockerfileVersion}
}

// DiskUsage lists what the build cache holds.
func (s *Server) DiskUsage(ctx context.Context, req *control.DiskUsageRequest) (*control.DiskUsageResponse, error) {
	keep, err := filterOf(req.Filter)
	if err != nil {
		return nil, err
	}
	all, err := s.backend.CacheUsage(ctx)
	if err != nil {
		return nil, err
	}
	out := &control.DiskUsageResponse{}
	for _, u := range all {
		if keep(u) && (req.AgeLimit == 0 || u.LastUsedAt == nil || time.Since(*u.LastUsedAt) > time.Duration(req.AgeLimit)) {
			out.Record = append(out.Record, usageRecord(u))
		}
	}
	return out, nil
}

// Prune removes from the build cache.
func (s *Server) Prune(req *control.PruneRequest, stream control.Control_PruneServer) error {
	var sending error
	err := s.backend.PruneCache(stream.Context(), client.PruneInfo{
		All: req.All, Filter: req.Filter, KeepDuration: time.Duration(req.KeepDuration), ReservedSpace: req.ReservedSpace,
		MaxUsedSpace: req.MaxUsedSpace, MinFreeSpace: req.MinFreeSpace,
	}, func(u client.UsageInfo) {
		if sending == nil {
			sending = stream.Send(usageRecord(u))
		}
	})
	if err == nil {
		err = sending
	}
	return err
}

func usageRecord(u client.UsageInfo) *control.UsageRecord {
	r := &control.UsageRecord{
		ID: u.ID, Mutable: u.Mutable, InUse: u.InUse, Size: u.Size, Parents: u.Parents, CreatedAt: timestamppb.New(u.CreatedAt),
		UsageCount: int64(u.UsageCount), Description: u.Description, RecordType: string(u.RecordType), Shared: u.Shared,
	}
	if u.LastUsedAt != nil {
		r.LastUsedAt = timestamppb.New(*u.LastUsedAt)
	}
	return r
}
