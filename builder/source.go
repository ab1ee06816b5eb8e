package builder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Schemes of source identifiers.
const (
	schemeImage = "docker-image://"
	schemeLocal = "local://"
)

func cutScheme(identifier, scheme string) (string, bool) {
	return strings.CutPrefix(identifier, scheme)
}

// resolved is a base image as this build knows it.
type resolved struct {
	digest digest.Digest
	config []byte
}

// resolve asks once for each image and platform.
func (s *session) resolve(ctx context.Context, ref string, platform ocispec.Platform) (digest.Digest, []byte, error) {
	id := ref + " " + platform.OS + "/" + platform.Architecture + "/" + platform.Variant
	s.mu.Lock()
	known, ok := s.resolved[id]
	s.mu.Unlock()
	if ok {
		return known.digest, known.config, nil
	}
	d, config, err := s.req.Images.Resolve(ctx, ref, platform, s.req.Pull)
	if err != nil {
		return "", nil, err
	}
	s.mu.Lock()
	s.resolved[id] = resolved{d, config}
	s.mu.Unlock()
	return d, config, nil
}

func (s *session) platformOf(v *vertex) ocispec.Platform {
	if p := v.op.Platform; p != nil {
		return ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}
	}
	return s.platform
}

// sourceKey is the identity of a source: the digest of an image, the digest of
// the files that a build reads of its context.
func (s *session) sourceKey(ctx context.Context, v *vertex, src *pb.SourceOp) (string, error) {
	if ref, ok := cutScheme(src.Identifier, schemeImage); ok {
		d, _, err := s.resolve(ctx, ref, s.platformOf(v))
		k := newKeyHash("image")
		k.add(d.String())
		return k.sum(), err
	}
	if _, ok := cutScheme(src.Identifier, schemeLocal); ok {
		t, err := s.local(ctx, v, src)
		if err != nil {
			return "", err
		}
		return t.key, nil
	}
	return "", fmt.Errorf("source %q: only images and the build context can be sources here: %w", src.Identifier, errdefs.ErrNotImplemented)
}

// source brings a source into the store.
func (s *session) source(ctx context.Context, v *vertex, src *pb.SourceOp) (outputs, error) {
	key, err := s.sourceKey(ctx, v, src)
	if err != nil {
		return outputs{}, err
	}
	if ref, ok := cutScheme(src.Identifier, schemeImage); ok {
		d, _, err := s.resolve(ctx, ref, s.platformOf(v))
		if err != nil {
			return outputs{}, err
		}
		return s.baseImage(ctx, v, ref, d, key)
	}
	return s.b.flights.do(ctx, key, func() (outputs, error) {
		out, ok, err := s.peek(ctx, key)
		if err == nil && ok {
			if err = s.hold(ctx, out.snapshots); err == nil {
				return out, nil
			}
		}
		t, err := s.local(ctx, v, src)
		if err != nil {
			return outputs{}, err
		}
		step := &step{s: s, v: v, key: key, began: time.Now()}
		return step.copyLocal(ctx, t)
	})
}

// holdTries is how often a base image is brought that is removed before the build
// holds it.
const holdTries = 3

// baseImage brings a base image into the store, and holds it. Somebody may remove
// it, or a limit have it evicted, between the two: then it is brought once more.
func (s *session) baseImage(ctx context.Context, v *vertex, ref string, d digest.Digest, key string) (outputs, error) {
	for try := 1; ; try++ {
		snap, err := s.req.Images.Snapshot(ctx, ref, d, s.platformOf(v))
		if err != nil {
			return outputs{}, err
		}
		out := outputs{key: key, snapshots: []layout.SnapshotKey{snap}}
		err = s.hold(ctx, out.snapshots)
		if try == holdTries || !errors.Is(err, errdefs.ErrNotFound) {
			return out, err
		}
	}
}

// explain gives an error of the frontend a kind.
func (s *session) explain(err error) error {
	switch {
	case errdefs.Has(err):
		return fmt.Errorf("build: %w", err)
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("build: %w: %w", err, errdefs.ErrNotFound)
	}
	return fmt.Errorf("build: %w: %w", err, errdefs.ErrInvalidArgument)
}
