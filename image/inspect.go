package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Summary is one image in a list.
type Summary struct {
	ID      digest.Digest // of the config, which docker shows
	Target  ocispec.Descriptor
	Names   []string // full, sorted
	Created time.Time
	// Size is what the image's blobs take as they are transferred; layers
	// that several images share are counted in each.
	Size     int64
	Platform ocispec.Platform
	// Err is set, and the rest but Target and Names unknown, when the
	// image's documents cannot be read; the list goes on.
	Err error
}

// Details is all there is to know of an image.
type Details struct {
	Summary
	Manifest ocispec.Descriptor
	Layers   []ocispec.Descriptor
	// Documents are the blobs above the layers: indexes, manifest, config.
	Documents []ocispec.Descriptor
	Image     ocispec.Image // the config
	JSON      []byte        // the config's bytes, as they are
	// Snapshot stands for the unpacked layers; "" when they are not, or
	// there are none.
	Snapshot layout.SnapshotKey
}

// localPick reads an image of the store for this machine, or where it was
// pulled for another platform, for that one.
func (s *Store) localPick(ctx context.Context, target ocispec.Descriptor) (*picked, error) {
	docs := newDocuments(s, nil)
	p, err := pick(ctx, docs.read, target, hostPlatform())
	if !errors.Is(err, errdefs.ErrNotFound) || !images.IsIndexType(target.MediaType) {
		return p, err
	}
	if p, other := s.pickPresent(ctx, docs, target, 0); other == nil {
		return p, nil
	}
	return nil, err
}

// pickFor is localPick, or the manifest for a platform.
func (s *Store) pickFor(ctx context.Context, target ocispec.Descriptor, platform platforms.MatchComparer) (*picked, error) {
	if platform == nil {
		return s.localPick(ctx, target)
	}
	return pick(ctx, newDocuments(s, nil).read, target, platform)
}

// pickPresent goes down from an index to the first manifest that was fetched.
func (s *Store) pickPresent(ctx context.Context, docs *documents, desc ocispec.Descriptor, depth int) (*picked, error) {
	if !images.IsIndexType(desc.MediaType) || depth == maxNesting {
		return pick(ctx, docs.read, desc, hostPlatform())
	}
	var index ocispec.Index
	if err := readJSON(ctx, docs.read, desc, maxManifest, &index); err != nil {
		return nil, err
	}
	for _, child := range index.Manifests {
		if p, err := s.pickPresent(ctx, docs, child, depth+1); err == nil {
			p.indexes = append([]ocispec.Descriptor{desc}, p.indexes...)
			return p, nil
		}
	}
	return nil, fmt.Errorf("index %s: no manifest of it in the store: %w", desc.Digest, errdefs.ErrNotFound)
}

// List returns all images, one entry for each target, by their first name.
func (s *Store) List(ctx context.Context) ([]Summary, error) {
	var order []digest.Digest
	byTarget := map[digest.Digest]*Summary{}
	err := s.each(ctx, func(name string, rec layout.ImageRecord) error {
		d := rec.Target.Digest
		if byTarget[d] == nil {
			byTarget[d] = &Summary{Target: rec.Target}
			order = append(order, d)
		}
		byTarget[d].Names = append(byTarget[d].Names, name)
		return nil
	})
	if err != nil {
		return nil, err
	}
	list := make([]Summary, 0, len(order))
	for _, d := range order {
		sum := byTarget[d]
		if p, err := s.localPick(ctx, sum.Target); err != nil {
			sum.Err = err
		} else {
			sum.fill(p)
		}
		list = append(list, *sum)
	}
	return list, nil
}

func (sum *Summary) fill(p *picked) {
	sum.ID, sum.Platform = p.config.Digest, p.image.Platform
	if p.image.Created != nil {
		sum.Created = *p.image.Created
	}
	sum.Size = p.manifest.Size + p.config.Size
	for _, l := range p.layers {
		sum.Size += l.Size
	}
}

// Inspect returns everything about the image that what names. Errors: those
// of [Store.Find]; Corrupt for documents that are damaged.
func (s *Store) Inspect(ctx context.Context, what string) (Details, error) {
	return s.InspectFor(ctx, what, nil)
}

// InspectFor is Inspect for a platform; nil stands for this machine's, or
// whichever is here. Errors: ErrNotFound if the image is here for others only.
func (s *Store) InspectFor(ctx context.Context, what string, platform platforms.MatchComparer) (Details, error) {
	found, err := s.Find(ctx, what)
	if err != nil {
		return Details{}, err
	}
	p, err := s.pickFor(ctx, found.Target, platform)
	if err != nil {
		return Details{}, err
	}
	d := Details{Summary: Summary{Target: found.Target, Names: found.Names}, Manifest: p.manifest, Layers: p.layers, Documents: p.documents(), Image: p.image}
	d.fill(p)
	if d.JSON, err = newDocuments(s, nil).read(ctx, p.config, maxConfig); err != nil {
		return Details{}, err
	}
	d.Snapshot, err = s.snapshotOf(ctx, p.manifest)
	return d, err
}

// Step is one line of an image's history.
type Step struct {
	ocispec.History
	Layer digest.Digest // of the blob; "" for a step without a layer
	Size  int64         // of the blob
}

// History returns the image's steps, the newest first.
func (s *Store) History(ctx context.Context, what string) ([]Step, error) {
	d, err := s.Inspect(ctx, what)
	if err != nil {
		return nil, err
	}
	var steps []Step
	next := 0
	for _, h := range d.Image.History {
		step := Step{History: h}
		if !h.EmptyLayer && next < len(d.Layers) {
			step.Layer, step.Size = d.Layers[next].Digest, d.Layers[next].Size
			next++
		}
		steps = append(steps, step)
	}
	// Configs may say less than there are layers.
	for ; next < len(d.Layers); next++ {
		steps = append(steps, Step{Layer: d.Layers[next].Digest, Size: d.Layers[next].Size})
	}
	slices.Reverse(steps)
	return steps, nil
}
