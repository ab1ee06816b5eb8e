package builder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	distref "github.com/distribution/reference"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/frontend/dockerui"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	bkerrdefs "github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/apicaps"
	"github.com/moby/buildkit/util/grpcerrors"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"varve.dev/builder/bridge"
	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/runtime"
)

// keySource is the frontend option that names an external frontend's image.
const keySource = "source"

// external runs the frontend that an image holds, in a container. It speaks
// with the build over its standard streams.
func (j *job) external(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
	g, ok := c.(*gateway)
	if !ok {
		return nil, fmt.Errorf("frontend of %T: %w", c, errdefs.ErrInternal)
	}
	if own, err := j.frontend(g.opts[keySource]); err == nil && g.opts[keySource] != "gateway.v0" {
		return own(ctx, g) // a syntax line that names the builder's own
	}
	state, img, err := g.frontendImage(ctx, g.opts[keySource])
	if err != nil {
		return nil, err
	}
	if err := checkCaps(img, g); err != nil {
		return nil, err
	}
	def, err := state.Marshal(ctx)
	if err != nil {
		return nil, err
	}
	res, err := g.Solve(ctx, gwclient.SolveRequest{Definition: def.ToPB()})
	if err != nil {
		return nil, err
	}
	ref, ok := res.Ref.(*reference)
	if !ok {
		return nil, fmt.Errorf("gateway source didn't return default result: %w", errdefs.ErrInvalidArgument)
	}
	image, err := ref.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	metadata, err := def.ToPB().MarshalVT()
	if err != nil {
		return nil, fmt.Errorf("frontend: %w: %w", err, errdefs.ErrInternal)
	}
	return j.runFrontend(ctx, g, img, image, metadata)
}

// frontendImage finds a frontend's image: a named context of the build, or one
// of a registry.
func (g *gateway) frontendImage(ctx context.Context, source string) (llb.State, *dockerspec.DockerOCIImage, error) {
	if source == "" {
		return llb.State{}, nil, fmt.Errorf("no source specified for gateway: %w", errdefs.ErrInvalidArgument)
	}
	ui, err := dockerui.NewClient(g)
	if err != nil {
		return llb.State{}, nil, err
	}
	named, err := ui.NamedContext(source, dockerui.ContextOpt{})
	if err != nil {
		return llb.State{}, nil, err
	}
	if named != nil {
		state, img, err := named.Load(ctx)
		if err != nil {
			return llb.State{}, nil, err
		}
		if img == nil {
			img = &dockerspec.DockerOCIImage{}
		}
		if state != nil {
			return *state, img, nil
		}
	}
	parsed, err := distref.ParseNormalizedNamed(source)
	if err != nil {
		return llb.State{}, nil, fmt.Errorf("frontend %q: %w: %w", source, err, errdefs.ErrInvalidArgument)
	}
	name, d, config, err := g.ResolveImageConfig(ctx, distref.TagNameOnly(parsed).String(), sourceresolver.Opt{})
	if err != nil {
		return llb.State{}, nil, err
	}
	var img dockerspec.DockerOCIImage
	if err := json.Unmarshal(config, &img); err != nil {
		return llb.State{}, nil, fmt.Errorf("frontend %q: config: %w: %w", source, err, errdefs.ErrInvalidArgument)
	}
	if parsed, err = distref.ParseNormalizedNamed(name); err == nil && d != "" {
		if pinned, err := distref.WithDigest(parsed, d); err == nil {
			name = pinned.String()
		}
	}
	return llb.Image(name), &img, nil
}

// checkCaps refuses a frontend that cannot do what is asked of it. The error is
// one that clients know.
func checkCaps(img *dockerspec.DockerOCIImage, g *gateway) error {
	has := splitCaps(img.Config.Labels["moby.buildkit.frontend.caps"])
	want := splitCaps(g.opts["frontend.caps"])
	if len(g.inputs) > 0 {
		want["moby.buildkit.frontend.inputs"] = true
	}
	for c := range want {
		if !has[c] {
			return grpcerrors.WrapCode(bkerrdefs.NewUnsupportedFrontendCapError(c), codes.Unimplemented)
		}
	}
	return nil
}

func splitCaps(list string) map[string]bool {
	out := map[string]bool{}
	for c := range strings.SplitSeq(list, ",") {
		if name, _, _ := strings.Cut(c, "+"); name != "" {
			out[name] = true
		}
	}
	return out
}

// runFrontend runs a frontend to its end, and returns what it returned.
func (j *job) runFrontend(ctx context.Context, g *gateway, img *dockerspec.DockerOCIImage, image layout.SnapshotKey, metadata []byte) (*gwclient.Result, error) {
	t := &step{j: j, began: time.Now()}
	active, tree, err := t.prepare(ctx, image)
	if err != nil {
		return nil, err
	}
	defer t.discard(active)
	dir, err := os.MkdirTemp(j.b.Scratch, "frontend-")
	if err != nil {
		return nil, fmt.Errorf("frontend: %w: %w", err, errdefs.ErrUnavailable)
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "frontend.bin"), metadata, 0o400); err != nil {
		return nil, fmt.Errorf("frontend: %w: %w", err, errdefs.ErrUnavailable)
	}
	e := &execution{step: t}
	defer func() { e.end(nil) }()
	e.spec = runtime.Spec{
		ID: "frontend-" + layout.NewID(), Args: img.Config.Entrypoint, Env: img.Config.Env, Cwd: img.Config.WorkingDir, Rootfs: tree,
		Mounts: []runtime.Mount{{Type: "bind", Source: dir, Target: "/run/config/buildkit/metadata", ReadOnly: true, Options: []string{"nosuid", "nodev", "noexec"}}},
	}
	if len(e.spec.Args) == 0 {
		e.spec.Args = []string{"/run"}
	}
	if err := e.frontendEnv(g); err != nil {
		return nil, err
	}
	offline, _ := strconv.ParseBool(img.Config.Labels["moby.buildkit.frontend.network.none"])
	if err := e.connect(offline, nil); err != nil {
		return nil, err
	}
	x, err := j.b.executor()
	if err != nil {
		return nil, err
	}
	b := bridge.New(g, g.inputs, LLBCaps())
	defer b.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	streams, err := serve(ctx, b)
	if err != nil {
		return nil, err
	}
	defer streams.close()
	exit, err := x.Run(ctx, e.spec, runtime.Streams{In: streams.stdin, Out: streams.stdout, Err: os.Stderr})
	if err == nil && exit.Error != "" {
		err = fmt.Errorf("frontend: %s: %w", exit.Error, errdefs.ErrFailedPrecondition)
	}
	if err == nil && exit.Code != 0 {
		err = fmt.Errorf("frontend: %w", &gwpb.ExitError{ExitCode: uint32(exit.Code)})
	}
	if err != nil {
		b.Fail(err)
	}
	return b.Result()
}

// frontendEnv is how a frontend in a container is told of the build.
func (e *execution) frontendEnv(g *gateway) error {
	i := 0
	for k, v := range g.opts {
		e.spec.Env = append(e.spec.Env, fmt.Sprintf("BUILDKIT_FRONTEND_OPT_%d=%s=%s", i, k, v))
		i++
	}
	workers, err := json.Marshal(g.BuildOpts().Workers)
	if err != nil {
		return fmt.Errorf("frontend: %w: %w", err, errdefs.ErrInternal)
	}
	e.spec.Env = append(e.spec.Env, "BUILDKIT_SESSION_ID="+g.j.sessionID(), "BUILDKIT_WORKERS="+string(workers),
		"BUILDKIT_EXPORTEDPRODUCT="+apicaps.ExportedProduct)
	return nil
}

// frontendStreams are the two ends of a connection over standard streams.
type frontendStreams struct {
	stdin, stdout *os.File // the frontend's
	conn          *pipeConn
}

func (s *frontendStreams) close() {
	s.stdin.Close()
	s.stdout.Close()
	s.conn.Close()
}

// serve answers a frontend's calls, until ctx ends.
func serve(ctx context.Context, b *bridge.Bridge) (*frontendStreams, error) {
	inR, inW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("frontend: %w: %w", err, errdefs.ErrResourceExhausted)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		inR.Close()
		inW.Close()
		return nil, fmt.Errorf("frontend: %w: %w", err, errdefs.ErrResourceExhausted)
	}
	s := &frontendStreams{stdin: inR, stdout: outW, conn: &pipeConn{r: outR, w: inW}}
	server := grpc.NewServer(grpc.UnaryInterceptor(grpcerrors.UnaryServerInterceptor), grpc.StreamInterceptor(grpcerrors.StreamServerInterceptor),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	gwpb.RegisterLLBBridgeServer(server, b)
	context.AfterFunc(ctx, func() { s.conn.Close() })
	go (&http2.Server{}).ServeConn(s.conn, &http2.ServeConnOpts{Context: ctx, Handler: server}) //nolint:staticcheck // one connection, of pipes: net/http wants a listener
	return s, nil
}

// maxMessage bounds a message between a frontend and the build, in bytes: a
// file that the frontend reads.
const maxMessage = maxFrontendFile + 1<<20

// pipeConn is a connection of two pipes.
type pipeConn struct{ r, w *os.File }

func (c *pipeConn) Read(p []byte) (int, error)  { return c.r.Read(p) }
func (c *pipeConn) Write(p []byte) (int, error) { return c.w.Write(p) }
func (c *pipeConn) Close() error                { return errors.Join(c.r.Close(), c.w.Close()) }

func (c *pipeConn) LocalAddr() net.Addr  { return pipeAddr{} }
func (c *pipeConn) RemoteAddr() net.Addr { return pipeAddr{} }

func (c *pipeConn) SetDeadline(t time.Time) error {
	return errors.Join(c.r.SetDeadline(t), c.w.SetDeadline(t))
}
func (c *pipeConn) SetReadDeadline(t time.Time) error  { return c.r.SetDeadline(t) }
func (c *pipeConn) SetWriteDeadline(t time.Time) error { return c.w.SetDeadline(t) }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "frontend" }
