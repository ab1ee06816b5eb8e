package builder

import (
	"context"

	ctrcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/moby/buildkit/client"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
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
	// Entitlements that a build may be granted, if its client grants them too:
	// "network.host", "security.insecure", "device".
	Entitlements []string
	CDIDirs      []string // of the specifications of this host's devices
	// ProvenanceEnv is told in the provenance of builds as facts of the builder,
	// beside its platform.
	ProvenanceEnv map[string]any
}

// Space keeps the build cache within its limits. Package gc has one.
type Space interface {
	// UseMount keeps a cache mount, which need not be there yet, until end is
	// called.
	UseMount(ctx context.Context, key string) (end func(), err error)
	// DropMount removes a cache mount that nobody uses.
	DropMount(ctx context.Context, key string) error
	// TrimCache makes room for what was stored in the cache.
	TrimCache(ctx context.Context) error
	// Kick says that something was let go of.
	Kick()
}

// noLimits is the space of a cache that has no limits.
type noLimits struct{}

func (noLimits) UseMount(context.Context, string) (func(), error) { return func() {}, nil }
func (noLimits) DropMount(context.Context, string) error          { return nil }
func (noLimits) TrimCache(context.Context) error                  { return nil }
func (noLimits) Kick()                                            {}

// Images are the base images of a build, and where built ones go.
type Images interface {
	// Resolve returns what ref stands for at the moment, and the config for
	// the platform. fresh asks the registry even if the image is here.
	Resolve(ctx context.Context, ref string, platform ocispec.Platform, fresh bool) (digest.Digest, []byte, error)
	// Snapshot returns the unpacked layers of ref as it was resolved, after
	// pulling it if need be; "" for an image without layers.
	Snapshot(ctx context.Context, ref string, resolved digest.Digest, platform ocispec.Platform) (layout.SnapshotKey, error)
	// ResolveIn and SnapshotIn are for an image of somebody else's store.
	ResolveIn(ctx context.Context, from Foreign, d digest.Digest, platform ocispec.Platform) ([]byte, error)
	// The snapshot stays as long as holder does.
	SnapshotIn(ctx context.Context, from Foreign, d digest.Digest, platform ocispec.Platform, holder layout.Node) (layout.SnapshotKey, error)
	// Origin is the repository of ref as such a store, and what ref stands for.
	Origin(ctx context.Context, ref string) (Foreign, ocispec.Descriptor, error)
	// Push sends an image of the store to the registry of name: under the
	// name's tag, or only under its digest.
	Push(ctx context.Context, name string, target ocispec.Descriptor, byDigest bool) error
}

// Foreign is a store that the build's client has.
type Foreign struct {
	Name  string // for people
	Store ctrcontent.InfoReaderProvider
}

// Builder builds images in one open store.
type Builder struct {
	Config
	flights flights
	slots   chan struct{} // steps that run at once
	mounts  mountLocks
	// producers are results of builds that go on.
	producers *producers
}

// parallelSteps is how many operations run at once, over all builds.
const parallelSteps = 4

// New returns a builder for the store that c belongs to.
func New(c Config) *Builder {
	if c.Space == nil {
		c.Space = noLimits{}
	}
	return &Builder{Config: c, flights: newFlights(), slots: make(chan struct{}, parallelSteps), mounts: newMountLocks(), producers: newProducers()}
}

// Request asks for a build: of a definition, by one of the builder's frontends,
// or by a frontend that whoever asks runs. It is BuildKit's request in
// BuildKit's terms.
type Request struct {
	Ref        string // names the build among those that run; empty: a new name
	Definition *pb.Definition
	Frontend   string // "dockerfile.v0" or "gateway.v0"
	Run        gwclient.BuildFunc

	Attrs  map[string]string         // of the frontend
	Inputs map[string]*pb.Definition // of the frontend

	Exports      []Export
	CacheTo      []CacheOption
	CacheFrom    []CacheOption
	Entitlements []string    // that the client grants
	Policy       *spb.Policy // on sources

	// Client answers for whoever asks: for directories, secrets, agents and
	// credentials, and for where results go. Nil if there is nobody.
	Client Client
	Images Images
	// Record has the response tell how the result came to be.
	Record bool
	// Progress is called from one goroutine at a time; it must not block for
	// long. Nil if nobody listens.
	Progress func(*client.SolveStatus)
}

// Client finds the sessions of clients. BuildKit's session manager is one, with
// the session of a build's own client.
type Client interface {
	// Caller returns the session with an id; the build's own for "". Errors:
	// ErrNotFound if it is not there in time.
	Caller(ctx context.Context, id string) (session.Caller, error)
	// ID is that of the build's own session.
	ID() string
}

// Export says what becomes of a result: BuildKit's exporters and their
// attributes.
type Export struct {
	Type  string // "image", "oci", "docker", "tar" or "local"
	Attrs map[string]string
}

// CacheOption is a place to take cache from or to leave it in.
type CacheOption struct {
	Type  string // "registry", "inline" or "local"
	Attrs map[string]string
}

// Response is what came of a build.
type Response struct {
	Exported map[string]string // exporters' answers, by BuildKit's keys
	// Provenance is that of each platform's result, or of the one under "", if
	// the request asks for a record.
	Provenance map[string]Provenance
}

// Provenance says how a result came to be.
type Provenance struct {
	PredicateType string
	Predicate     []byte // JSON
}

// Build carries out a build and exports its result. After an error no name
// changed; what steps had finished stays in the cache.
//
// Errors of a step name the Dockerfile's line. ErrInvalidArgument for what the
// Dockerfile gets wrong, ErrNotFound for a base image that is nowhere.
func (b *Builder) Build(ctx context.Context, req Request) (Response, error) {
	j, err := b.begin(ctx, req)
	if err != nil {
		return Response{}, err
	}
	defer j.end()
	exporters, err := j.exporters()
	if err != nil {
		return Response{}, err
	}
	caches, err := j.cacheExports()
	if err != nil {
		return Response{}, err
	}
	wishes, err := wishesOf(j.req.Attrs)
	if err != nil {
		return Response{}, err
	}
	res, err := j.result(ctx)
	if err != nil {
		return Response{}, explain(err)
	}
	if err := j.attach(ctx, wishes, res); err != nil {
		return Response{}, explain(err)
	}
	out, err := j.finish(ctx, res, exporters)
	if err == nil && res != nil {
		err = j.exportCache(ctx, res, caches, out.Exported)
	}
	if err == nil && res != nil && req.Record {
		out.Provenance, err = j.recorded(ctx, res)
	}
	return out, explain(err)
}

// result runs the frontend, or takes the definition as it is, and solves what
// it comes to.
func (j *job) result(ctx context.Context) (*gwclient.Result, error) {
	g := &gateway{j: j, opts: j.req.Attrs, inputs: j.req.Inputs, trace: j.newTrace()}
	run := j.req.Run
	if run == nil {
		run = func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
			return c.Solve(ctx, gwclient.SolveRequest{
				Definition: j.req.Definition, Frontend: j.req.Frontend, FrontendOpt: j.req.Attrs, FrontendInputs: j.req.Inputs,
			})
		}
	}
	res, err := run(ctx, g)
	if err != nil {
		return nil, err
	}
	return res, j.evaluate(ctx, res)
}
