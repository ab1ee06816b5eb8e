package image

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// defaultParallel is how many layers are downloaded at once.
const defaultParallel = 3

// PullOptions may be left zero.
type PullOptions struct {
	// Platform chooses from an index; nil is this machine's.
	Platform platforms.MatchComparer
	// Parallel is how many layers are downloaded at once; 0 means 3.
	Parallel int
	Progress Progress
}

// Pulled is what a pull ended with.
type Pulled struct {
	Name string
	// Summary is the image that the registry has under the name.
	Summary
	// Fresh is false when everything was there and the name stood for it
	// already.
	Fresh bool
}

// Pull brings the image ref from its registry and unpacks it. After nil the
// image is durable under its name; after an error the store shows nothing of
// it, and what was downloaded is taken up by the next pull where that makes
// sense.
//
// Errors name the registry or the blob: ErrNotFound, ErrPermissionDenied,
// ErrUnavailable (registry or network), ErrFailedPrecondition (bytes that do
// not fit their digest, size or DiffID), ErrNotImplemented (media types),
// ErrInvalidArgument, ErrResourceExhausted (disk, documents too large).
func (s *Store) Pull(ctx context.Context, ref Ref, options PullOptions) (Pulled, error) {
	if options.Parallel <= 0 {
		options.Parallel = defaultParallel
	}
	if options.Platform == nil {
		options.Platform = hostPlatform()
	}
	target, err := s.target(ctx, ref)
	if err != nil {
		return Pulled{}, err
	}
	repo, err := s.remotes.Repository(ctx, ref)
	if err != nil {
		return Pulled{}, err
	}
	return s.pull(ctx, wanted{name: ref.String(), familiar: ref.Familiar(), origin: ref.Repository(), target: target}, repo, options)
}

// wanted is an image that is to be brought.
type wanted struct {
	name     string // that it gets; "" if it is held by holder alone
	familiar string // for people
	origin   string // repository that its blobs can be had from again; "" for none
	target   ocispec.Descriptor
	holder   layout.Node
}

func (s *Store) pull(ctx context.Context, w wanted, repo *Repository, options PullOptions) (Pulled, error) {
	docs := newDocuments(s, repo)
	p, err := pick(ctx, docs.read, w.target, options.Platform)
	if err != nil {
		return Pulled{}, fmt.Errorf("pull %s: %w", w.familiar, err)
	}
	done := Pulled{Name: w.name, Summary: Summary{Target: w.target, Names: []string{w.name}}}
	done.fill(p)
	if whole, err := s.isWhole(ctx, w.name, p); err != nil {
		return done, err
	} else if whole {
		if w.name == "" {
			return done, nil
		}
		return done, errors.Join(s.Touch(ctx, w.name), s.db.Settle(ctx))
	}
	done.Fresh = true
	a, err := s.assemble(ctx, "pull "+w.familiar, w.origin, p.blobs())
	if err != nil {
		return Pulled{}, err
	}
	if err := a.bring(ctx, p, docs, repo, options); err != nil {
		return Pulled{}, a.abandon(err)
	}
	edges := p.edges(a.has)
	if w.name == "" {
		held := layout.Edge{Parent: w.holder, Rel: layout.RelHolds, Child: layout.BlobNode(layout.BlobDigest(w.target.Digest))}
		return done, a.publish(ctx, nil, append(edges, held))
	}
	now := time.Now().UTC()
	name := layout.ImageMake{Name: w.name, Record: layout.ImageRecord{Target: w.target, Created: now, Updated: now}}
	return done, a.publish(ctx, []layout.ImageMake{name}, edges)
}

func (a *assembly) bring(ctx context.Context, p *picked, docs *documents, repo *Repository, options PullOptions) error {
	if err := a.layers(ctx, p, repo.Open, options.Parallel, options.Progress); err != nil {
		return err
	}
	// The documents come last: they are small, and a pull that fails leaves
	// none of them.
	for _, desc := range p.documents() {
		if a.has(desc.Digest) {
			continue
		}
		data, err := docs.read(ctx, desc, maxConfig)
		if err != nil {
			return err
		}
		if err := a.addSmall(ctx, desc, data); err != nil {
			return err
		}
	}
	return nil
}

// target is what ref stands for: the registry's answer, or for a digest that
// is in the store already, no question at all.
func (s *Store) target(ctx context.Context, ref Ref) (ocispec.Descriptor, error) {
	if d := ref.Digest(); d != "" {
		if rec, err := s.image(ctx, ref.String()); err == nil && rec.Target.Digest == d {
			return rec.Target, nil
		}
	}
	return s.remotes.Resolve(ctx, ref)
}

// isWhole tells whether name stands for p's target, if there is to be one, and
// nothing of it is missing.
func (s *Store) isWhole(ctx context.Context, name string, p *picked) (bool, error) {
	whole := false
	err := s.db.View(ctx, func(tx *metadata.Tx) error {
		if name != "" {
			rec, err := tx.Images().Get(name)
			if errors.Is(err, errdefs.ErrNotFound) {
				return nil
			}
			if err != nil || rec.Target.Digest != p.target().Digest {
				return err
			}
		}
		for _, d := range p.documents() {
			if !tx.Blobs().Has(layout.BlobDigest(d.Digest)) {
				return nil
			}
		}
		var err error
		whole, err = s.hasLayers(tx, p)
		return err
	})
	return whole, err
}

// hasLayers: unpacked, or where nothing is unpacked, every blob.
func (s *Store) hasLayers(tx *metadata.Tx, p *picked) (bool, error) {
	if s.unpacker != nil {
		key, err := unpackedIn(tx, p.manifest)
		return key != "" || len(p.layers) == 0, err
	}
	for _, d := range p.layers {
		if !tx.Blobs().Has(layout.BlobDigest(d.Digest)) {
			return false, nil
		}
	}
	return true, nil
}

// documents are the small blobs above the layers, from the top down.
func (p *picked) documents() []ocispec.Descriptor {
	return append(append([]ocispec.Descriptor{}, p.indexes...), p.manifest, p.config)
}

func (p *picked) blobs() (all []digest.Digest) {
	for _, d := range append(p.documents(), p.layers...) {
		all = append(all, d.Digest)
	}
	return all
}

// edges are the references of the image's documents to what is in the store.
// The manifests of other platforms were not fetched and get none.
func (p *picked) edges(has func(digest.Digest) bool) (edges []layout.Edge) {
	link := func(parent, child ocispec.Descriptor) {
		if has(child.Digest) {
			edges = append(edges, layout.Edge{
				Parent: layout.BlobNode(layout.BlobDigest(parent.Digest)), Rel: layout.RelContent,
				Child: layout.BlobNode(layout.BlobDigest(child.Digest)),
			})
		}
	}
	way := append(append([]ocispec.Descriptor{}, p.indexes...), p.manifest)
	for i := 1; i < len(way); i++ {
		link(way[i-1], way[i])
	}
	link(p.manifest, p.config)
	for _, l := range p.layers {
		link(p.manifest, l)
	}
	return edges
}
