package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Limits on what is read into memory. The distribution specification asks
// registries to take manifests of 4 MiB; configs are not limited anywhere, the
// largest seen are below 1 MiB.
const (
	maxManifest = 4 << 20
	maxConfig   = 8 << 20
	// maxNesting is how deep an index may lie in an index.
	maxNesting = 4
	// maxLayers is what a chain may hold; see package snapshotter for mounts.
	maxLayers = 500
)

// blobReader gives the bytes of a blob that is at most limit long.
type blobReader func(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error)

// picked is one image for one platform: the way down to its layers.
type picked struct {
	indexes  []ocispec.Descriptor // outermost first; empty for a single manifest
	manifest ocispec.Descriptor
	config   ocispec.Descriptor
	layers   []ocispec.Descriptor
	diffIDs  []layout.DiffID
	image    ocispec.Image
}

// target is what a name points to.
func (p *picked) target() ocispec.Descriptor {
	if len(p.indexes) > 0 {
		return p.indexes[0]
	}
	return p.manifest
}

// checkDescriptor refuses what nothing can be done with.
func checkDescriptor(of string, desc ocispec.Descriptor) error {
	if _, err := layout.ParseBlobDigest(desc.Digest.String()); err != nil {
		return fmt.Errorf("%s: %w", of, err)
	}
	if desc.Size < 0 {
		return fmt.Errorf("%s: blob %s has the size %d: %w", of, desc.Digest, desc.Size, errdefs.ErrInvalidArgument)
	}
	return nil
}

// pick goes from target down to config and layers, through the manifest that
// fits the platform best.
func pick(ctx context.Context, read blobReader, target ocispec.Descriptor, platform platforms.MatchComparer) (*picked, error) {
	p := &picked{}
	desc := target
	for images.IsIndexType(desc.MediaType) {
		if len(p.indexes) == maxNesting {
			return nil, fmt.Errorf("index %s lies more than %d indexes deep: %w", desc.Digest, maxNesting, errdefs.ErrInvalidArgument)
		}
		p.indexes = append(p.indexes, desc)
		var index ocispec.Index
		if err := readJSON(ctx, read, desc, maxManifest, &index); err != nil {
			return nil, err
		}
		if err := sameType(desc, index.MediaType); err != nil {
			return nil, err
		}
		var err error
		if desc, err = choose(desc, index, platform); err != nil {
			return nil, err
		}
	}
	if err := p.readManifest(ctx, read, desc); err != nil {
		return nil, err
	}
	return p, nil
}

// sameType refuses a document that calls itself something else than what led
// to it does: the same bytes must not be an index to one reader and a manifest
// to another (CVE-2021-41190).
func sameType(desc ocispec.Descriptor, itself string) error {
	if itself != "" && itself != desc.MediaType {
		return fmt.Errorf("blob %s is announced as %q and calls itself %q: %w", desc.Digest, desc.MediaType, itself, errdefs.ErrInvalidArgument)
	}
	return nil
}

// choose returns the child of an index for the platform. Attestations carry
// the platform "unknown/unknown" and so never fit.
func choose(of ocispec.Descriptor, index ocispec.Index, platform platforms.MatchComparer) (ocispec.Descriptor, error) {
	var best *ocispec.Descriptor
	var have []string
	for _, child := range index.Manifests {
		if err := checkDescriptor("index "+of.Digest.String(), child); err != nil {
			return ocispec.Descriptor{}, err
		}
		if child.Platform == nil {
			// Without a platform only a nested index or a lone manifest
			// can be meant.
			if best == nil && (images.IsIndexType(child.MediaType) || len(index.Manifests) == 1) {
				best = &child
			}
			continue
		}
		have = append(have, platforms.Format(*child.Platform))
		if platform.Match(*child.Platform) && (best == nil || best.Platform == nil || platform.Less(*child.Platform, *best.Platform)) {
			best = &child
		}
	}
	if best == nil {
		return ocispec.Descriptor{}, fmt.Errorf("index %s has no manifest for this platform, only for %v: %w", of.Digest, have, errdefs.ErrNotFound)
	}
	return *best, nil
}

func (p *picked) readManifest(ctx context.Context, read blobReader, desc ocispec.Descriptor) error {
	switch {
	case desc.MediaType == images.MediaTypeDockerSchema1Manifest || desc.MediaType == mediaTypeSchema1Plain:
		return fmt.Errorf("manifest %s: media type %q (schema 1) is not supported, the image has to be pushed again by a current tool: %w", desc.Digest, desc.MediaType, errdefs.ErrNotImplemented)
	case !images.IsManifestType(desc.MediaType):
		return fmt.Errorf("manifest %s: unknown media type %q: %w", desc.Digest, desc.MediaType, errdefs.ErrNotImplemented)
	}
	var m ocispec.Manifest
	if err := readJSON(ctx, read, desc, maxManifest, &m); err != nil {
		return err
	}
	if err := errors.Join(sameType(desc, m.MediaType), checkManifest(desc, m)); err != nil {
		return err
	}
	if err := readJSON(ctx, read, m.Config, maxConfig, &p.image); err != nil {
		return err
	}
	p.manifest, p.config, p.layers = desc, m.Config, m.Layers
	if len(m.Layers) != len(p.image.RootFS.DiffIDs) {
		return fmt.Errorf("manifest %s has %d layers, its config %s has %d: %w", desc.Digest, len(m.Layers), m.Config.Digest, len(p.image.RootFS.DiffIDs), errdefs.ErrInvalidArgument)
	}
	for _, d := range p.image.RootFS.DiffIDs {
		if err := d.Validate(); err != nil || d.Algorithm() != layout.Algorithm {
			return fmt.Errorf("config %s: %q is no DiffID: %w", m.Config.Digest, d, errdefs.ErrInvalidArgument)
		}
		p.diffIDs = append(p.diffIDs, layout.DiffID(d))
	}
	return nil
}

// mediaTypeSchema1Plain is schema 1 without signatures.
const mediaTypeSchema1Plain = "application/vnd.docker.distribution.manifest.v1+json"

func checkManifest(desc ocispec.Descriptor, m ocispec.Manifest) error {
	of := "manifest " + desc.Digest.String()
	if len(m.Layers) > maxLayers {
		return fmt.Errorf("%s has %d layers, more than %d: %w", of, len(m.Layers), maxLayers, errdefs.ErrInvalidArgument)
	}
	if !images.IsConfigType(m.Config.MediaType) {
		return fmt.Errorf("%s: config %s has the unknown media type %q: %w", of, m.Config.Digest, m.Config.MediaType, errdefs.ErrNotImplemented)
	}
	for _, d := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if err := checkDescriptor(of, d); err != nil {
			return err
		}
	}
	for _, l := range m.Layers {
		if !images.IsLayerType(l.MediaType) {
			return fmt.Errorf("%s: layer %s has the unknown media type %q: %w", of, l.Digest, l.MediaType, errdefs.ErrNotImplemented)
		}
		if images.IsNonDistributable(l.MediaType) {
			return fmt.Errorf("%s: layer %s (%s) is not in the registry, layers from elsewhere are not supported: %w", of, l.Digest, l.MediaType, errdefs.ErrNotImplemented)
		}
	}
	return nil
}

// readJSON reads a small blob, compares it with its descriptor, and decodes
// it into v.
func readJSON(ctx context.Context, read blobReader, desc ocispec.Descriptor, limit int64, v any) error {
	if err := checkDescriptor(desc.MediaType, desc); err != nil {
		return err
	}
	if desc.Size > limit {
		return fmt.Errorf("blob %s (%s) has %d bytes, at most %d are read: %w", desc.Digest, desc.MediaType, desc.Size, limit, errdefs.ErrResourceExhausted)
	}
	data, err := read(ctx, desc, limit)
	if err != nil {
		return err
	}
	if int64(len(data)) != desc.Size {
		return fmt.Errorf("blob %s (%s) has %d bytes, %d were announced: %w", desc.Digest, desc.MediaType, len(data), desc.Size, errdefs.ErrFailedPrecondition)
	}
	if got := digest.FromBytes(data); got != desc.Digest {
		return fmt.Errorf("blob %s (%s) has the digest %s: %w", desc.Digest, desc.MediaType, got, errdefs.ErrFailedPrecondition)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("blob %s (%s): %w: %w", desc.Digest, desc.MediaType, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// read is a blobReader on the registry.
func (r *Repository) read(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	body := r.Open(ctx, desc, 0)
	defer body.Close()
	data, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return data, nil
}
