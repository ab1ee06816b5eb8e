package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"

	"varve.dev/errdefs"
)

// RemoteOptions say how registries are reached.
type RemoteOptions struct {
	// HostsDir holds a folder for each registry with a hosts.toml, as
	// containerd has it: mirrors, capabilities, headers, certificates.
	HostsDir string
	// PlainHTTP lists registries (host:port) that speak no TLS; "*" is all.
	// On loopback, plain HTTP is found out without being asked for.
	PlainHTTP []string
	// Credentials may be nil: anonymous.
	Credentials Credentials
	// Patience; the zero value is [DefaultPatience].
	Patience Patience
	// UserAgent names the client to the registry; "" is "varve".
	UserAgent string
}

// Remotes speaks to registries. Its connections and tokens are shared by all
// operations. It may be used from several goroutines.
type Remotes struct {
	options  RemoteOptions
	resolver remotes.Resolver

	mu    sync.Mutex
	hosts map[string]knownHosts
}

// knownHosts are clients for one registry, with their connections and tokens.
type knownHosts struct {
	hosts []docker.RegistryHost
	made  time.Time
}

// hostsAge is how long clients are kept: after it a changed hosts.toml and a
// new login are seen by a daemon that runs on.
const hostsAge = 5 * time.Minute

// NewRemotes returns a client for registries.
func NewRemotes(options RemoteOptions) *Remotes {
	if options.Patience == (Patience{}) {
		options.Patience = DefaultPatience()
	}
	r := &Remotes{options: options, hosts: map[string]knownHosts{}}
	r.resolver = r.newResolver()
	return r
}

// newResolver returns containerd's resolver over the shared clients.
func (r *Remotes) newResolver() remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{
		Hosts: r.registryHosts, Tracker: docker.NewInMemoryTracker(),
		Headers: http.Header{"User-Agent": {r.agent()}},
	})
}

func (r *Remotes) agent() string { return cmp.Or(r.options.UserAgent, "varve") }

// registryHosts is asked by the resolver for every operation. It answers from
// memory: each answer of containerd's function is a new client with
// connections and tokens of its own.
func (r *Remotes) registryHosts(registry string) ([]docker.RegistryHost, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if known, ok := r.hosts[registry]; ok && time.Since(known.made) < hostsAge {
		return known.hosts, nil
	}
	hosts, err := config.ConfigureHosts(quiet(context.Background()), r.hostOptions(registry))(registry)
	if err != nil {
		return nil, fmt.Errorf("configuration of registry %s: %w: %w", registry, err, errdefs.ErrInvalidArgument)
	}
	for i := range hosts {
		client, headers := hosts[i].Client, hosts[i].Header.Clone()
		if headers == nil {
			headers = http.Header{}
		}
		headers.Set("User-Agent", r.agent())
		hosts[i].Authorizer = newAuthorizer(func() docker.Authorizer {
			return docker.NewDockerAuthorizer(docker.WithAuthClient(client), docker.WithAuthHeader(headers), docker.WithAuthCreds(r.credentials))
		})
	}
	r.hosts[registry] = knownHosts{hosts, time.Now()}
	return hosts, nil
}

// forget drops the clients of a registry that refused their credentials: the
// user's next step is to log in and try again.
func (r *Remotes) forget(registry string, err error) {
	if errors.Is(err, errdefs.ErrPermissionDenied) {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.hosts, registry)
	}
}

func (r *Remotes) hostOptions(registry string) config.HostOptions {
	options := config.HostOptions{UpdateClient: r.guardClient}
	if r.options.HostsDir != "" {
		options.HostDir = config.HostDirFromRoot(r.options.HostsDir)
	}
	if slices.Contains(r.options.PlainHTTP, registry) || slices.Contains(r.options.PlainHTTP, "*") {
		options.DefaultScheme = "http"
	}
	return options
}

// credentials is asked within a request that has a deadline, and bounds
// itself as well.
func (r *Remotes) credentials(host string) (string, string, error) {
	if r.options.Credentials == nil {
		return "", "", nil
	}
	return r.options.Credentials(context.Background(), host)
}

// guardClient puts the guard under a client that was just made. It is called
// again for a host with settings of its own, which may share the transport.
func (r *Remotes) guardClient(client *http.Client) error {
	transport, ok := client.Transport.(*http.Transport)
	if !ok {
		return nil
	}
	transport.MaxIdleConnsPerHost = 16
	client.Transport = &guard{next: identityOnly{transport}, patience: r.options.Patience}
	return nil
}

// identityOnly refuses an encoding of the answers on the way: offsets of a
// Range would count encoded bytes, and blobs are compressed already.
type identityOnly struct{ next http.RoundTripper }

func (t identityOnly) RoundTrip(req *http.Request) (*http.Response, error) {
	req.Header.Set("Accept-Encoding", "identity")
	return t.next.RoundTrip(req)
}

// quiet keeps containerd's code from writing to the process's log: what it has
// to say that matters comes back as an error, and a command line's output is
// its own.
func quiet(ctx context.Context) context.Context {
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	return log.WithLogger(ctx, logrus.NewEntry(logger))
}

// Close drops idle connections.
func (r *Remotes) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, known := range r.hosts {
		for _, h := range known.hosts {
			if h.Client != nil {
				h.Client.CloseIdleConnections()
			}
		}
	}
}

// CloseIdleConnections lets http.Client reach the transport below the guard.
func (g *guard) CloseIdleConnections() {
	if t, ok := g.next.(identityOnly); ok {
		if inner, ok := t.next.(interface{ CloseIdleConnections() }); ok {
			inner.CloseIdleConnections()
		}
	}
}

// Resolve asks the registry what ref stands for at the moment.
//
// Errors: ErrNotFound, ErrPermissionDenied, ErrUnavailable, ErrNotImplemented
// for a manifest of schema 1.
func (r *Remotes) Resolve(ctx context.Context, ref Ref) (ocispec.Descriptor, error) {
	_, desc, err := r.resolver.Resolve(quiet(ctx), ref.String())
	if err != nil {
		err = remoteError("resolve "+ref.Familiar(), err)
		r.forget(ref.Domain(), err)
		return ocispec.Descriptor{}, err
	}
	return desc, checkDescriptor(ref.Familiar(), desc)
}

// Repository gives access to the blobs of ref's repository.
func (r *Remotes) Repository(ctx context.Context, ref Ref) (*Repository, error) {
	fetcher, err := r.resolver.Fetcher(quiet(ctx), ref.String())
	if err != nil {
		return nil, remoteError("registry of "+ref.Familiar(), err)
	}
	return &Repository{name: ref.FamiliarRepository(), fetcher: fetcher, patience: r.options.Patience}, nil
}

// Repository is where an image's blobs come from.
type Repository struct {
	name     string // for people
	fetcher  remotes.Fetcher
	patience Patience
}
