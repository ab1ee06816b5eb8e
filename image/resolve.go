package image

import (
	"context"
	"fmt"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/layout"
	"varve.dev/metadata"
)

// Resolved is an image for one platform, as far as its documents say.
type Resolved struct {
	Target   ocispec.Descriptor // what the name stands for: an index or a manifest
	Manifest ocispec.Descriptor
	Config   ocispec.Descriptor
	JSON     []byte // the config's bytes, as they are
}

// Resolve asks the registry what ref stands for at the moment and reads the
// config for the platform (nil: this machine), without bringing anything into
// the store. Documents that the store has are not fetched; a ref with a digest
// that the store has under that name asks nobody. Errors are those of
// [Store.Pull].
func (s *Store) Resolve(ctx context.Context, ref Ref, platform platforms.MatchComparer) (Resolved, error) {
	if platform == nil {
		platform = hostPlatform()
	}
	target, err := s.target(ctx, ref)
	if err != nil {
		return Resolved{}, err
	}
	repo, err := s.remotes.Repository(ctx, ref)
	if err != nil {
		return Resolved{}, err
	}
	r, err := resolved(ctx, newDocuments(s, repo), target, platform)
	if err != nil {
		return Resolved{}, fmt.Errorf("resolve %s: %w", ref.Familiar(), err)
	}
	return r, nil
}

// ResolveLocal is Resolve for an image of the store, by name or id, and asks
// no registry. Errors: those of [Store.Find]; ErrNotFound when the image is
// here for other platforms only.
func (s *Store) ResolveLocal(ctx context.Context, what string, platform platforms.MatchComparer) (Resolved, error) {
	if platform == nil {
		platform = hostPlatform()
	}
	found, err := s.Find(ctx, what)
	if err != nil {
		return Resolved{}, err
	}
	r, err := resolved(ctx, newDocuments(s, nil), found.Target, platform)
	if err != nil {
		return Resolved{}, fmt.Errorf("image %s: %w", what, err)
	}
	return r, nil
}

func resolved(ctx context.Context, docs *documents, target ocispec.Descriptor, platform platforms.MatchComparer) (Resolved, error) {
	p, err := pick(ctx, docs.read, target, platform)
	if err != nil {
		return Resolved{}, err
	}
	data, err := docs.read(ctx, p.config, maxConfig)
	return Resolved{Target: target, Manifest: p.manifest, Config: p.config, JSON: data}, err
}

// snapshotOf returns the snapshot of a manifest's unpacked layers, or "".
func (s *Store) snapshotOf(ctx context.Context, manifest ocispec.Descriptor) (key layout.SnapshotKey, err error) {
	err = s.db.View(ctx, func(tx *metadata.Tx) error {
		key, err = unpackedIn(tx, manifest)
		return err
	})
	return key, err
}

func unpackedIn(tx *metadata.Tx, manifest ocispec.Descriptor) (layout.SnapshotKey, error) {
	children, err := tx.Children(layout.BlobNode(layout.BlobDigest(manifest.Digest)))
	for _, e := range children {
		if e.Rel == layout.RelUnpacked {
			_, key := e.Child.Split()
			return layout.SnapshotKey(key), err
		}
	}
	return "", err
}
