package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/platforms"
	"github.com/moby/buildkit/client"
	dockerfileversion "github.com/moby/buildkit/frontend/dockerfile/version"
	"github.com/moby/buildkit/session/auth"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"

	"varve.dev/api/buildkit"
	"varve.dev/api/varve"
	"varve.dev/builder"
	"varve.dev/errdefs"
	"varve.dev/gc"
	"varve.dev/image"
	"varve.dev/internal/version"
	"varve.dev/layout"
)

// Solve implements buildkit.Backend.
func (e *Engine) Solve(ctx context.Context, req builder.Request) (out builder.Response, err error) {
	registry, err := e.registryOf(&req)
	if err != nil {
		return out, err
	}
	req.Images = baseImages{e: e, registry: registry, client: req.Client}
	err = e.healing(ctx, registry, func() (err error) {
		out, err = e.builder.Build(ctx, req)
		return err
	})
	return out, err
}

// registryOf takes the frontend option out that says how to talk to registries:
// it is for this builder alone.
func (e *Engine) registryOf(req *builder.Request) (r varve.Registry, err error) {
	r = e.options.Registry
	text, ok := req.Attrs[varve.RegistryOption]
	if !ok {
		return r, nil
	}
	req.Attrs = maps.Clone(req.Attrs)
	delete(req.Attrs, varve.RegistryOption)
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return r, fmt.Errorf("option %s: %w: %w", varve.RegistryOption, err, errdefs.ErrInvalidArgument)
	}
	return r, nil
}

// summaryOfBuilt describes an image that was just made. It may have been removed
// since, or evicted: what it was is no error.
func (e *Engine) summaryOfBuilt(ctx context.Context, built builder.Committed) (varve.ImageSummary, error) {
	summary, err := e.summary(ctx, built.Config.Digest.String())
	if errors.Is(err, errdefs.ErrNotFound) {
		return varve.ImageSummary{Name: "<none>", ID: built.Config.Digest.String(), Digest: built.Manifest.Digest.String()}, nil
	}
	return summary, err
}

// baseImages are the images of the store, and of registries, as a build wants
// them.
type baseImages struct {
	e        *Engine
	registry varve.Registry
	client   builder.Client // whose credentials are used; may be nil
}

// imagesFor are the images with the way to ref's registry that the build's client
// has.
func (b baseImages) imagesFor(ctx context.Context, ref image.Ref) *image.Store {
	options := remoteOptions(b.registry, ref)
	if b.client != nil && b.registry.Auth == nil {
		options.Credentials = b.credentials(ctx)
	}
	return b.e.images.With(image.NewRemotes(options))
}

// credentials asks the build's client; one that has none to give is anonymous.
func (b baseImages) credentials(build context.Context) image.Credentials {
	return func(_ context.Context, host string) (user, secret string, err error) {
		caller, err := b.client.Caller(build, "")
		if err != nil {
			return "", "", nil
		}
		ctx, cancel := context.WithTimeout(build, auth.SessionAuthTimeout)
		defer cancel()
		c, err := auth.NewAuthClient(caller.Conn()).Credentials(caller.Context(ctx), &auth.CredentialsRequest{Host: host})
		if grpcerrors.Code(err) == codes.Unimplemented {
			return "", "", nil
		}
		if err != nil {
			return "", "", fmt.Errorf("credentials for %s: %w: %w", host, err, errdefs.ErrUnavailable)
		}
		return c.Username, c.Secret, nil
	}
}

// ResolveIn implements builder.Images.
func (b baseImages) ResolveIn(ctx context.Context, from builder.Foreign, d digest.Digest, platform ocispec.Platform) ([]byte, error) {
	r, err := b.e.images.ResolveIn(ctx, image.Foreign(from), d, platforms.Only(platform))
	return r.JSON, err
}

// SnapshotIn implements builder.Images.
func (b baseImages) SnapshotIn(ctx context.Context, from builder.Foreign, d digest.Digest, platform ocispec.Platform, holder layout.Node) (layout.SnapshotKey, error) {
	return b.e.images.PullFrom(ctx, image.Foreign(from), d, holder, image.PullOptions{Platform: platforms.Only(platform)})
}

// Push implements builder.Images.
func (b baseImages) Push(ctx context.Context, name string, target ocispec.Descriptor, byDigest bool) error {
	ref, err := image.ParseRef(name)
	if err != nil {
		return err
	}
	_, err = b.imagesFor(ctx, ref).PushTarget(ctx, ref, target, image.PushOptions{ByDigest: byDigest})
	return err
}

// Origin implements builder.Images.
func (b baseImages) Origin(ctx context.Context, name string) (builder.Foreign, ocispec.Descriptor, error) {
	ref, err := image.ParseRef(name)
	if err != nil {
		return builder.Foreign{}, ocispec.Descriptor{}, err
	}
	from, desc, err := b.imagesFor(ctx, ref).Origin(ctx, ref)
	return builder.Foreign(from), desc, err
}

// Resolve implements builder.Images.
func (b baseImages) Resolve(ctx context.Context, name string, platform ocispec.Platform, fresh bool) (digest.Digest, []byte, error) {
	ref, err := image.ParseRef(name)
	if err != nil {
		return "", nil, err
	}
	match := platforms.Only(platform)
	images := b.imagesFor(ctx, ref)
	if !fresh {
		r, err := images.ResolveLocal(ctx, ref.String(), match)
		if err == nil {
			return r.Target.Digest, r.JSON, nil
		}
		if !errors.Is(err, errdefs.ErrNotFound) {
			return "", nil, err
		}
	}
	r, err := images.Resolve(ctx, ref, match)
	return r.Target.Digest, r.JSON, err
}

// Snapshot implements builder.Images. The frontend writes the digest that was
// resolved behind the name; under the name alone the image may be here.
func (b baseImages) Snapshot(ctx context.Context, name string, resolved digest.Digest, platform ocispec.Platform) (layout.SnapshotKey, error) {
	ref, err := image.ParseRef(name)
	if err != nil {
		return "", err
	}
	candidates := []string{ref.String()}
	if ref.Digest() != "" {
		tag, _, _ := strings.Cut(name, "@")
		if tagged, err := image.ParseRef(tag); err == nil {
			candidates = append(candidates, tagged.String())
		}
	}
	match := platforms.Only(platform)
	for _, c := range candidates {
		d, err := b.e.unpackedFor(ctx, c, match)
		if err == nil && d.Target.Digest == resolved {
			return d.Snapshot, b.e.images.Touch(ctx, c)
		}
		if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			return "", err
		}
	}
	options := image.PullOptions{Platform: match}
	for try := 1; ; try++ {
		pulled, err := b.imagesFor(ctx, ref).Pull(ctx, ref, options)
		if err != nil {
			return "", err
		}
		d, err := b.e.images.InspectFor(ctx, pulled.Name, match)
		if try == useTries || !errors.Is(err, errdefs.ErrNotFound) {
			return d.Snapshot, err
		}
	}
}

// Worker implements buildkit.Backend.
func (k *Keeper) Worker() buildkit.Worker {
	return buildkit.Worker{
		ID: "varve", Labels: k.options.BuildLabels, Platforms: []ocispec.Platform{platforms.Normalize(platforms.DefaultSpec())},
		Version: client.BuildkitVersion{Package: "varve.dev", Version: version.BuildKit(), Revision: version.Version, DockerfileVersion: dockerfileversion.Version()},
	}
}

// Solve implements buildkit.Backend. BuildKit's clients do not know of a store
// that is opened again: a build that was cut off by it is carried out once more,
// if it is all here.
func (k *Keeper) Solve(ctx context.Context, req builder.Request) (builder.Response, error) {
	solve := func(ctx context.Context, e *Engine) (builder.Response, error) { return e.Solve(ctx, req) }
	out, err := call(ctx, k, solve)
	if errors.Is(err, varve.ErrReopened) && ctx.Err() == nil && req.Run == nil && staysHere(req.Exports) {
		k.notice(fmt.Sprintf("a build is carried out once more: %v", err))
		return call(ctx, k, solve)
	}
	return out, err
}

// staysHere tells whether exports send their client nothing, which it may have
// had in part.
func staysHere(exports []builder.Export) bool {
	return !slices.ContainsFunc(exports, func(e builder.Export) bool { return e.Type != client.ExporterImage })
}

// CacheUsage implements buildkit.Backend.
func (k *Keeper) CacheUsage(ctx context.Context) ([]client.UsageInfo, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) ([]client.UsageInfo, error) { return e.CacheUsage(ctx) })
}

// PruneCache implements buildkit.Backend.
func (k *Keeper) PruneCache(ctx context.Context, req client.PruneInfo, gone func(client.UsageInfo)) error {
	return do(ctx, k, func(ctx context.Context, e *Engine) error { return e.PruneCache(ctx, req, gone) })
}

// CacheUsage lists the results of the build cache and its mounts.
func (e *Engine) CacheUsage(ctx context.Context) (out []client.UsageInfo, err error) {
	results, err := e.collector.Results(ctx)
	if err != nil {
		return nil, err
	}
	for _, r := range results {
		last := r.LastUse
		out = append(out, client.UsageInfo{
			ID: r.Key, InUse: r.InUse, Size: r.Size, CreatedAt: r.Created, LastUsedAt: &last, UsageCount: int(r.Uses),
			Description: r.Description, RecordType: client.UsageRecordTypeRegular,
		})
	}
	mounts, err := e.collector.Mounts(ctx)
	for _, m := range mounts {
		when := m.When
		out = append(out, client.UsageInfo{
			ID: m.ID, Mutable: true, Size: m.Bytes, CreatedAt: when, LastUsedAt: &when, Description: "cache mount " + m.Name,
			RecordType: client.UsageRecordTypeCacheMount,
		})
	}
	return out, err
}

// PruneCache removes from the build cache what is older than the request keeps,
// down to the space that it reserves.
func (e *Engine) PruneCache(ctx context.Context, req client.PruneInfo, gone func(client.UsageInfo)) error {
	before, err := e.CacheUsage(ctx)
	if err != nil {
		return err
	}
	p := gc.CachePrune{Keep: max(req.ReservedSpace, req.MaxUsedSpace), Held: req.All}
	if req.KeepDuration > 0 {
		p.Before = time.Now().Add(-req.KeepDuration)
	}
	if _, err := e.collector.PruneCache(ctx, p); err != nil {
		return err
	}
	after, err := e.CacheUsage(ctx)
	if err != nil {
		return err
	}
	left := map[string]bool{}
	for _, u := range after {
		left[u.ID] = true
	}
	for _, u := range before {
		if !left[u.ID] {
			gone(u)
		}
	}
	return nil
}

// BlobInfo implements buildkit.Backend.
func (k *Keeper) BlobInfo(ctx context.Context, d digest.Digest) (content.Info, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (content.Info, error) { return e.blobs.Info(ctx, d) })
}

// BlobReader implements buildkit.Backend.
func (k *Keeper) BlobReader(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	return call(ctx, k, func(ctx context.Context, e *Engine) (content.ReaderAt, error) { return e.blobs.ReaderAt(ctx, desc) })
}
