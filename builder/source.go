package builder

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Schemes of source identifiers.
const (
	schemeImage     = "docker-image://"
	schemeLocal     = "local://"
	schemeGit       = "git://"
	schemeHTTP      = "http://"
	schemeHTTPS     = "https://"
	schemeOCILayout = "oci-layout://"
)

func cutScheme(identifier, scheme string) (string, bool) {
	return strings.CutPrefix(identifier, scheme)
}

// origin is where a source's files come from.
type origin interface {
	// identify returns the key of what the source is at the moment.
	identify(ctx context.Context) (string, error)
	// bring has the files in the store, and held by the build.
	bring(ctx context.Context, key string) (outputs, error)
}

// source is one vertex's origin, with what came of it in this build.
type source struct {
	origin
	mu  sync.Mutex
	key string
}

// identity asks once, but for failures.
func (s *source) identity(ctx context.Context) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.key != "" {
		return s.key, nil
	}
	key, err := s.identify(ctx)
	s.key = key
	return key, err
}

// sourceOf returns the source of a vertex.
func (j *job) sourceOf(v *vertex, op *pb.SourceOp) (*source, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if s := j.sources[v.digest]; s != nil {
		return s, nil
	}
	o, err := j.originOf(v, op)
	if err != nil {
		return nil, err
	}
	s := &source{origin: o}
	j.sources[v.digest] = s
	return s, nil
}

func (j *job) originOf(v *vertex, op *pb.SourceOp) (origin, error) {
	scheme, rest, ok := strings.Cut(op.Identifier, "://")
	if !ok {
		return nil, fmt.Errorf("source %q has no scheme: %w", op.Identifier, errdefs.ErrInvalidArgument)
	}
	switch scheme + "://" {
	case schemeImage:
		return &imageOrigin{j: j, v: v, ref: rest, attrs: op.Attrs}, nil
	case schemeLocal:
		return newLocalOrigin(j, v, rest, op.Attrs)
	case schemeOCILayout:
		return newLayoutOrigin(j, j.platformOf(v), rest, op.Attrs)
	case schemeHTTP, schemeHTTPS:
		return newHTTPOrigin(j, v, op)
	case schemeGit:
		return newGitOrigin(j, v, op)
	}
	return nil, fmt.Errorf("source %q: its scheme is not known here: %w", op.Identifier, errdefs.ErrNotImplemented)
}

// sourceKey is the identity of a source: the digest of an image, the digest of
// the files that a build reads of its context.
func (j *job) sourceKey(ctx context.Context, v *vertex, op *pb.SourceOp) (string, error) {
	s, err := j.sourceOf(v, op)
	if err != nil {
		return "", err
	}
	return s.identity(ctx)
}

// source brings a source into the store.
func (j *job) source(ctx context.Context, v *vertex, op *pb.SourceOp) (outputs, error) {
	s, err := j.sourceOf(v, op)
	if err != nil {
		return outputs{}, err
	}
	j.progress.begin(v)
	key, err := s.identity(ctx)
	if err != nil {
		return outputs{}, err
	}
	out, err := s.bring(ctx, key)
	if err == nil {
		j.progress.end(v, nil)
	}
	return out, err
}

// resolved is a base image as this build knows it.
type resolved struct {
	digest digest.Digest
	config []byte
}

// resolve asks once for each image and platform.
func (j *job) resolve(ctx context.Context, ref string, platform ocispec.Platform, mode string) (digest.Digest, []byte, error) {
	id := ref + " " + platforms.FormatAll(platform)
	j.mu.Lock()
	known, ok := j.resolved[id]
	j.mu.Unlock()
	if ok {
		return known.digest, known.config, nil
	}
	d, config, err := j.req.Images.Resolve(ctx, ref, platform, mode == pb.AttrImageResolveModeForcePull)
	if err != nil {
		return "", nil, err
	}
	j.mu.Lock()
	j.resolved[id] = resolved{d, config}
	j.mu.Unlock()
	return d, config, nil
}

func (j *job) platformOf(v *vertex) ocispec.Platform {
	if p := v.op.Platform; p != nil {
		return p.Spec()
	}
	return j.platform
}

// imageOrigin is an image of a registry or of the store.
type imageOrigin struct {
	j     *job
	v     *vertex
	ref   string
	attrs map[string]string
}

func (o *imageOrigin) identify(ctx context.Context) (string, error) {
	d, _, err := o.j.resolve(ctx, o.ref, o.j.platformOf(o.v), o.attrs[pb.AttrImageResolveMode])
	return imageKey(d, o.j.platformOf(o.v)), err
}

// imageKey names what an image has for a platform.
func imageKey(d digest.Digest, p ocispec.Platform) string {
	k := newKeyHash("image")
	k.add(d.String(), platforms.FormatAll(p))
	return k.sum()
}

// holdTries is how often a base image is brought that is removed before the build
// holds it.
const holdTries = 3

// bring: somebody may remove the image, or a limit have it evicted, between the
// pull and the hold: then it is brought once more.
func (o *imageOrigin) bring(ctx context.Context, key string) (outputs, error) {
	platform := o.j.platformOf(o.v)
	d, _, err := o.j.resolve(ctx, o.ref, platform, o.attrs[pb.AttrImageResolveMode])
	if err != nil {
		return outputs{}, err
	}
	return o.j.holdImage(ctx, key, func() (layout.SnapshotKey, error) {
		return o.j.req.Images.Snapshot(ctx, o.ref, d, platform)
	})
}

// holdImage has an image brought and holds it.
func (j *job) holdImage(ctx context.Context, key string, bring func() (layout.SnapshotKey, error)) (outputs, error) {
	for try := 1; ; try++ {
		snap, err := bring()
		if err != nil {
			return outputs{}, err
		}
		out := outputs{key: key, snapshots: []layout.SnapshotKey{snap}}
		err = j.hold(ctx, out.snapshots)
		if try == holdTries || !errors.Is(err, errdefs.ErrNotFound) {
			return out, err
		}
	}
}
