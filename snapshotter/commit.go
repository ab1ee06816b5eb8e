package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/journal"
	"varve.dev/layer"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// Commit makes an active snapshot the committed snapshot name, which lives
// until Remove. Nobody may have it mounted for writing. Errors: ErrNotFound;
// ErrAlreadyExists for the name; ErrFailedPrecondition if key is not active.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	var info snapshots.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return err
		}
	}
	return s.commit(ctx, layout.ContainerdNode, layout.SnapshotKey(name), layout.SnapshotKey(key), info.Labels, nil)
}

// CommitFor is Commit for a snapshot that lives as long as holder, or any
// other reference to it, does. extend, which may be nil, adds to what is
// published in the same step.
func (s *Snapshotter) CommitFor(ctx context.Context, holder layout.Node, name, key layout.SnapshotKey, extend func(*layout.IntentRecord)) error {
	return s.commit(ctx, holder, name, key, nil, extend)
}

func (s *Snapshotter) commit(ctx context.Context, holder layout.Node, name, key layout.SnapshotKey, labels map[string]string, extend func(*layout.IntentRecord)) error {
	if err := layout.CheckName("snapshot name", string(name)); err != nil {
		return err
	}
	if err := s.journal.FinishPending(ctx); err != nil {
		return fmt.Errorf("commit snapshot %q: %w", key, err) // it may be this one
	}
	rec, err := s.checkCommit(ctx, name, key)
	if err != nil {
		return err
	}
	// The work directory is overlay's scratch; what a mount left there is
	// no part of the layer.
	dir := layout.ActivePath(rec.Layer)
	if err := s.root.RemoveAll(path.Join(dir, layout.WorkDir)); err != nil {
		return fmt.Errorf("commit snapshot %q: %w", key, err)
	}
	barrier := s.root.NewBarrier()
	m, err := layer.Walk(ctx, s.root.Path(activeTree(rec.Layer)), layer.WalkOptions{File: barrier.Add})
	if err != nil {
		barrier.Abandon()
		return fmt.Errorf("commit snapshot %q: %w", key, err)
	}
	if err := s.dropNeedlessOpaques(ctx, m, rec, barrier); err != nil {
		barrier.Abandon()
		return fmt.Errorf("commit snapshot %q: %w", key, err)
	}
	blob, scratch, err := s.stageManifest(m, barrier)
	if err != nil {
		barrier.Abandon()
		return fmt.Errorf("commit snapshot %q: %w", key, err)
	}
	now := time.Now().UTC()
	size, inodes := m.Usage()
	space := s.space.Claim(fmt.Sprintf("commit snapshot %q", key))
	defer space.Release()
	if err := space.Write(ctx, size); err != nil {
		barrier.Abandon()
		s.journal.Discard(scratch)
		return err
	}
	in := layout.IntentRecord{
		Purpose: fmt.Sprintf("commit snapshot %q", name),
		Blobs:   []layout.BlobMove{blob},
		Layers: []layout.LayerMove{{ID: rec.Layer, From: dir, Record: layout.LayerRecord{
			Manifest: blob.Digest, Size: size, Inodes: inodes, Created: now,
		}}},
		Snapshots: []layout.SnapshotMake{{Key: name, Record: layout.SnapshotRecord{
			Kind: layout.SnapshotCommitted, Parent: rec.Parent, Layer: rec.Layer,
			Created: now, Updated: now, Labels: maps.Clone(labels), Size: size, Inodes: inodes,
		}}},
		Edges: []layout.Edge{{Parent: holder, Rel: layout.RelHolds, Child: layout.SnapshotNode(name)}},
		Gone:  []layout.SnapshotKey{key},
	}
	if extend != nil {
		extend(&in)
	}
	err = s.journal.Publish(ctx, barrier, in)
	if !errors.Is(err, journal.ErrIntended) {
		s.journal.Discard(scratch)
	}
	return err
}

// dropNeedlessOpaques makes the layer one that can be stacked on others.
func (s *Snapshotter) dropNeedlessOpaques(ctx context.Context, m *layer.Manifest, rec layout.SnapshotRecord, barrier *durable.Barrier) error {
	if !m.HasOpaque() {
		return nil
	}
	parents, err := s.Layers(ctx, rec.Parent)
	if err != nil {
		return err
	}
	tree, err := s.root.NewTree(activeTree(rec.Layer), barrier)
	if err != nil {
		return err
	}
	defer tree.Close()
	return m.DropNeedlessOpaques(tree, parents)
}

func (s *Snapshotter) checkCommit(ctx context.Context, name, key layout.SnapshotKey) (rec layout.SnapshotRecord, err error) {
	err = s.db.View(ctx, func(tx *metadata.Tx) error {
		if rec, err = tx.Snapshots().Get(key); err != nil {
			return err
		}
		if rec.Kind != layout.SnapshotActive {
			return fmt.Errorf("snapshot %q is not active but %s: %w", key, rec.Kind, errdefs.ErrFailedPrecondition)
		}
		if tx.Snapshots().Has(name) {
			return fmt.Errorf("snapshot %q: %w", name, errdefs.ErrAlreadyExists)
		}
		return nil
	})
	return rec, err
}

// stageManifest writes a file manifest into a place of its own in staging and
// seals it. It returns the place too.
func (s *Snapshotter) stageManifest(m *layer.Manifest, barrier *durable.Barrier) (layout.BlobMove, string, error) {
	_, place, err := s.journal.NewStaging()
	if err != nil {
		return layout.BlobMove{}, "", err
	}
	from := path.Join(place, "files")
	move, err := s.writeManifest(m, from, barrier)
	if err != nil {
		s.journal.Discard(place)
		return layout.BlobMove{}, "", err
	}
	return move, place, nil
}

func (s *Snapshotter) writeManifest(m *layer.Manifest, from string, barrier *durable.Barrier) (layout.BlobMove, error) {
	f, err := s.root.CreateFile(from, 0o600)
	if err != nil {
		return layout.BlobMove{}, err
	}
	sum := digest.Canonical.Digester()
	if err := m.Encode(io.MultiWriter(f, sum.Hash())); err != nil {
		f.Close()
		return layout.BlobMove{}, err
	}
	now := time.Now().UTC()
	rec := layout.BlobRecord{Size: f.Size(), Created: now, Updated: now}
	return layout.BlobMove{Digest: layout.BlobDigest(sum.Digest()), From: from, Record: rec}, f.Seal(barrier, 0o444)
}

// Layers returns the layers of a committed snapshot with their file manifests,
// the topmost first. Errors: ErrNotFound; Corrupt (L3, B1, B2).
func (s *Snapshotter) Layers(ctx context.Context, key layout.SnapshotKey) ([]layer.Parent, error) {
	var out []layer.Parent
	for at := key; at != ""; {
		rec, err := s.record(ctx, at)
		if err != nil {
			return nil, fmt.Errorf("chain of snapshot %q: %w", key, err)
		}
		p, err := s.parentOf(ctx, rec.Layer)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
		at = rec.Parent
	}
	return out, nil
}

// parentOf loads a layer's file manifest.
func (s *Snapshotter) parentOf(ctx context.Context, id layout.LayerID) (layer.Parent, error) {
	var rec layout.LayerRecord
	err := s.db.View(ctx, func(tx *metadata.Tx) (err error) {
		rec, err = tx.Layers().Get(id)
		return err
	})
	if err != nil {
		return layer.Parent{}, err
	}
	r, err := s.blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: rec.Manifest.Digest()})
	if err != nil {
		return layer.Parent{}, fmt.Errorf("file manifest of layer %s: %w", id, err)
	}
	defer r.Close()
	m, err := layer.Decode(io.NewSectionReader(r, 0, r.Size()))
	if err != nil {
		return layer.Parent{}, &errdefs.Corrupt{Invariant: "L3", Object: "layer " + string(id), Detail: err.Error()}
	}
	return layer.Parent{Manifest: m, Dir: s.root.Path(layerTree(id))}, nil
}
