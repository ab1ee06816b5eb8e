package snapshotter

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"varve.dev/errdefs"
	"varve.dev/layer"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// LayerIDs returns the layers that a committed snapshot stands on, its own
// included, the bottom one first; none for "". Errors: ErrNotFound.
func (s *Snapshotter) LayerIDs(ctx context.Context, key layout.SnapshotKey) (ids []layout.LayerID, err error) {
	err = s.db.View(ctx, func(tx *metadata.Tx) error {
		ids = nil
		return eachBelow(tx, key, func(rec layout.SnapshotRecord) { ids = append(ids, rec.Layer) })
	})
	slices.Reverse(ids)
	return ids, err
}

// Stack makes name a committed snapshot that shows layers, which exist, on top
// of parent ("" for none), the lowest first. No file is copied: the trees are
// shared. It lives as long as holder, or any other reference to it; extend,
// which may be nil, adds to what is published in the same step.
//
// A layer's opaque directories and whiteouts hide what parent has. Errors:
// ErrNotFound; ErrInvalidArgument for no layers; ErrFailedPrecondition for
// more than overlayfs can stack.
func (s *Snapshotter) Stack(ctx context.Context, holder layout.Node, name, parent layout.SnapshotKey, layers []layout.LayerID, extend func(*layout.IntentRecord)) error {
	if err := layout.CheckName("snapshot name", string(name)); err != nil {
		return err
	}
	if len(layers) == 0 {
		return fmt.Errorf("stack snapshot %q: no layers: %w", name, errdefs.ErrInvalidArgument)
	}
	now := time.Now().UTC()
	in := layout.IntentRecord{
		Purpose: fmt.Sprintf("stack snapshot %q", name),
		Edges:   []layout.Edge{{Parent: holder, Rel: layout.RelHolds, Child: layout.SnapshotNode(name)}},
	}
	err := s.db.View(ctx, func(tx *metadata.Tx) error {
		if tx.Snapshots().Has(name) {
			return fmt.Errorf("snapshot %q: %w", name, errdefs.ErrAlreadyExists)
		}
		below := 0
		if err := eachBelow(tx, parent, func(layout.SnapshotRecord) { below++ }); err != nil {
			return err
		}
		if below+len(layers) > maxChain {
			return fmt.Errorf("%d layers on %d are more than overlayfs can stack, %d: %w", len(layers), below, maxChain, errdefs.ErrFailedPrecondition)
		}
		in.Snapshots = nil
		on := parent
		for i, id := range layers {
			rec, err := tx.Layers().Get(id)
			if err != nil {
				return err
			}
			key := name
			if i < len(layers)-1 {
				key = layout.SnapshotKey("stack:" + layout.NewID())
			}
			in.Snapshots = append(in.Snapshots, layout.SnapshotMake{Key: key, Record: layout.SnapshotRecord{
				Kind: layout.SnapshotCommitted, Parent: on, Layer: id,
				Created: now, Updated: now, Size: rec.Size, Inodes: rec.Inodes,
			}})
			on = key
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("stack snapshot %q: %w", name, err)
	}
	if extend != nil {
		extend(&in)
	}
	return s.journal.Publish(ctx, s.root.NewBarrier(), in)
}

// Fill unpacks an uncompressed layer stream into an active snapshot, which is
// empty and mounted nowhere. The stream takes nothing from what is below: see
// [layer.Applied.Resolve] without parents. Errors: as layer.Apply;
// ErrFailedPrecondition for another kind of snapshot.
func (s *Snapshotter) Fill(ctx context.Context, key layout.SnapshotKey, tar io.Reader) error {
	rec, err := s.record(ctx, key)
	if err != nil {
		return err
	}
	if rec.Kind != layout.SnapshotActive {
		return fmt.Errorf("fill snapshot %q: it is not active but %s: %w", key, rec.Kind, errdefs.ErrFailedPrecondition)
	}
	barrier := s.root.NewBarrier()
	defer barrier.Abandon() // the commit has one of its own
	tree, err := s.root.NewTree(activeTree(rec.Layer), barrier)
	if err != nil {
		return err
	}
	defer tree.Close()
	space := s.space.Claim(fmt.Sprintf("fill snapshot %q", key))
	defer space.Release() // claimed again by the commit, when it is known what it takes
	applied, err := layer.Apply(ctx, tar, tree, func(bytes int64) error { return space.Write(ctx, bytes) })
	if err != nil {
		return fmt.Errorf("fill snapshot %q: %w", key, err)
	}
	return applied.Resolve(nil)
}
