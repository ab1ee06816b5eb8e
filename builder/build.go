package builder

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	dockerfile "github.com/moby/buildkit/frontend/dockerfile/builder"
	"github.com/moby/buildkit/frontend/dockerui"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/runtime"
	"varve.dev/snapshotter"
)

// Config is what a Builder stands on.
type Config struct {
	Root    *durable.Root
	DB      *metadata.DB
	Journal *journal.Journal
	Blobs   *content.Store
	Snaps   *snapshotter.Snapshotter
	Shim    func() (string, error) // path of the shim, asked for when a step runs
	Scratch string                 // directory for what lives as long as a step
	Space   Space                  // nil: no limits
}

// Space keeps the build cache within its limits. Package gc has one.
type Space interface {
	// UseMount keeps a cache mount, which need not be there yet, until end is
	// called.
	UseMount(ctx context.Context, key string) (end func(), err error)
	// TrimCache makes room for what was stored in the cache.
	TrimCache(ctx context.Context) error
	// Kick says that something was let go of.
	Kick()
}

// noLimits is the space of a cache that has no limits.
type noLimits struct{}

func (noLimits) UseMount(context.Context, string) (func(), error) { return func() {}, nil }
func (noLimits) TrimCache(context.Context) error                  { return nil }
func (noLimits) Kick()                                            {}

// Images are the base images of a build.
type Images interface {
	// Resolve returns what ref stands for at the moment, and the config for
	// the platform. fresh asks the registry even if the image is here.
	Resolve(ctx context.Context, ref string, platform ocispec.Platform, fresh bool) (digest.Digest, []byte, error)
	// Snapshot returns the unpacked layers of ref as it was resolved, after
	// pulling it if need be; "" for an image without layers.
	Snapshot(ctx context.Context, ref string, resolved digest.Digest, platform ocispec.Platform) (layout.SnapshotKey, error)
}

// Builder builds images in one open store.
type Builder struct {
	Config
	flights flights
	slots   chan struct{} // steps that run at once
	mounts  mountLocks
}

// parallelSteps is how many operations run at once, over all builds.
const parallelSteps = 4

// New returns a builder for the store that c belongs to.
func New(c Config) *Builder {
	if c.Space == nil {
		c.Space = noLimits{}
	}
	return &Builder{Config: c, flights: newFlights(), slots: make(chan struct{}, parallelSteps), mounts: newMountLocks()}
}

// Request asks for a build.
type Request struct {
	Images     Images
	Context    string // directory
	Dockerfile string // its path in the context; empty: "Dockerfile"
	// DockerfileBytes are a Dockerfile from outside the context.
	DockerfileBytes []byte
	Target          string
	BuildArgs       map[string]string
	Labels          map[string]string
	Platform        string // empty: this host's
	Network         string // of RUN steps: "host", "none", or empty
	ExtraHosts      []string
	NoCache         bool
	Pull            bool
	Names           []string // full names for the image
	Progress        func(Event)
}

// Event is one step of progress. Log is output, the rest replaces what was
// known of the step with this ID.
type Event struct {
	ID   string
	Name string
	State
	Log  []byte
	Text string // of a failure or a warning
}

// State is where a step stands.
type State string

// The states.
const (
	Started   State = "running"
	Cached    State = "cached"
	Completed State = "done"
	Failed    State = "failed"
	Warned    State = "warning"
)

// Result is an image that was built.
type Result struct {
	Manifest ocispec.Descriptor
	Config   ocispec.Descriptor
	// Steps were demanded; of them Cached were known and Ran were carried
	// out.
	Steps, Cached, Ran int
}

// Build carries out a build and exports its result as an image under the
// request's names. After an error no name changed; what steps had finished
// stays in the cache.
//
// Errors of a step name the Dockerfile's line. ErrInvalidArgument for what the
// Dockerfile gets wrong, ErrNotFound for a base image that is nowhere.
func (b *Builder) Build(ctx context.Context, req Request) (Result, error) {
	platform, err := platformOf(req.Platform)
	if err != nil {
		return Result{}, err
	}
	s, err := b.begin(ctx, req, platform)
	if err != nil {
		return Result{}, err
	}
	defer s.end()
	res, err := dockerfile.Build(ctx, &gateway{s: s})
	if err != nil {
		return Result{}, s.explain(err)
	}
	out, err := s.finish(ctx, res)
	if err != nil {
		return Result{}, s.explain(err)
	}
	return out, nil
}

// begin makes what one build needs; end gives it back.
func (b *Builder) begin(ctx context.Context, req Request, platform ocispec.Platform) (*session, error) {
	s := &session{
		b: b, req: req, platform: platform, lease: b.DB.NewLease("build"),
		solving: newFlights(), memo: map[digest.Digest]result{}, keys: map[digest.Digest]string{},
		resolved: map[string]resolved{}, locals: map[digest.Digest]*localTree{},
	}
	return s, s.lease.Make(ctx)
}

func (s *session) end() {
	_ = s.lease.Release(context.Background())
	s.b.Journal.Kick()
	s.b.Space.Kick()
}

func platformOf(s string) (ocispec.Platform, error) {
	if s == "" {
		return platforms.Normalize(platforms.DefaultSpec()), nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return p, fmt.Errorf("platform %q: %w: %w", s, err, errdefs.ErrInvalidArgument)
	}
	if !platforms.Default().Match(p) {
		return p, fmt.Errorf("platform %q cannot run on this host: %w", s, errdefs.ErrNotImplemented)
	}
	return platforms.Normalize(p), nil
}

// session is one Build.
type session struct {
	b        *Builder
	req      Request
	platform ocispec.Platform
	lease    *metadata.Lease
	solving  flights // of vertices

	mu       sync.Mutex // guards the rest
	memo     map[digest.Digest]result
	keys     map[digest.Digest]string // definition keys, as far as they were worked out
	resolved map[string]resolved
	locals   map[digest.Digest]*localTree
	steps    int
	cached   int
	ran      int
}

// options are what the frontend calls frontend options.
func (s *session) options() map[string]string {
	opts := map[string]string{
		"filename": s.dockerfileName(),
		"platform": platforms.FormatAll(s.platform),
	}
	set := func(key, value string) {
		if value != "" {
			opts[key] = value
		}
	}
	set("target", s.req.Target)
	set("force-network-mode", s.req.Network)
	set("add-hosts", strings.Join(extraHosts(s.req.ExtraHosts), ","))
	if s.req.NoCache {
		opts["no-cache"] = ""
	}
	if s.req.Pull {
		opts["image-resolve-mode"] = "pull"
	}
	for k, v := range s.req.BuildArgs {
		opts["build-arg:"+k] = v
	}
	for k, v := range s.req.Labels {
		opts["label:"+k] = v
	}
	return opts
}

// extraHosts turns NAME:ADDRESS into the frontend's NAME=ADDRESS.
func extraHosts(list []string) (out []string) {
	for _, h := range list {
		name, address, _ := strings.Cut(h, ":")
		out = append(out, name+"="+address)
	}
	return out
}

func (s *session) dockerfileName() string {
	if s.req.Dockerfile == "" || s.req.DockerfileBytes != nil {
		return dockerui.DefaultDockerfileName
	}
	return s.req.Dockerfile
}

func (s *session) event(e Event) {
	if s.req.Progress != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.req.Progress(e)
	}
}

// executor runs steps.
func (b *Builder) executor() (*runtime.Executor, error) {
	shim, err := b.Shim()
	if err != nil {
		return nil, err
	}
	return &runtime.Executor{Shim: shim, Dir: b.Scratch}, nil
}
