package builder

import (
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/moby/buildkit/solver/pb"

	"varve.dev/errdefs"
	"varve.dev/layer"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/overlay"
)

// mergeInput returns the tree of an operation's input; "" for no input, which
// stands for an empty tree.
func (t *step) mergeInput(input int64) (layout.SnapshotKey, error) {
	if input == int64(pb.Empty) {
		return "", nil
	}
	if input < 0 || input >= int64(len(t.inputs)) {
		return "", fmt.Errorf("the operation has no input %d: %w", input, errdefs.ErrInvalidArgument)
	}
	return t.inputs[input], nil
}

// merge stacks the layers of trees on those of the first one.
func (t *step) merge(ctx context.Context, op *pb.MergeOp) (outputs, error) {
	var base layout.SnapshotKey
	var above []layout.LayerID
	for _, in := range op.Inputs {
		key, err := t.mergeInput(in.GetInput())
		if err != nil {
			return outputs{}, err
		}
		if base == "" {
			base = key // what is empty adds nothing
			continue
		}
		ids, err := t.j.b.Snaps.LayerIDs(ctx, key)
		if err != nil {
			return outputs{}, err
		}
		above = append(above, ids...)
	}
	return t.stack(ctx, base, above)
}

// diff makes the tree that turns lower into upper when it is merged onto it.
// Looked at alone it shows only what upper has that lower has not, but a
// listing of its directories may name what upper does not have any more.
func (t *step) diff(ctx context.Context, op *pb.DiffOp) (outputs, error) {
	lower, err := t.mergeInput(op.Lower.GetInput())
	if err != nil {
		return outputs{}, err
	}
	upper, err := t.mergeInput(op.Upper.GetInput())
	if err != nil {
		return outputs{}, err
	}
	below, err := t.j.b.Snaps.LayerIDs(ctx, lower)
	if err != nil {
		return outputs{}, err
	}
	all, err := t.j.b.Snaps.LayerIDs(ctx, upper)
	if err != nil {
		return outputs{}, err
	}
	switch {
	case len(below) == 0:
		return t.stack(ctx, upper, nil)
	case len(all) >= len(below) && slices.Equal(all[:len(below)], below):
		return t.stack(ctx, "", all[len(below):])
	}
	return t.compare(ctx, lower, upper)
}

// stack makes base with layers on it the result of the step.
func (t *step) stack(ctx context.Context, base layout.SnapshotKey, above []layout.LayerID) (outputs, error) {
	out := outputs{key: t.key, snapshots: []layout.SnapshotKey{base}}
	switch {
	case len(above) > 0:
		out.snapshots[0] = layout.SnapshotKey("build:" + layout.NewID())
		extend := func(in *layout.IntentRecord) { in.Cache = t.records(out) }
		return out, t.j.b.Snaps.Stack(ctx, t.j.lease.Node(), out.snapshots[0], base, above, extend)
	case base == "":
		return out, nil // nothing to keep, and nothing is saved by it
	}
	return out, t.j.b.DB.Update(ctx, func(tx *metadata.Tx) error {
		for _, m := range t.records(out) {
			if err := tx.PutCache(m.Key, m.Record); err != nil {
				return err
			}
		}
		return nil
	})
}

// compare makes a layer of the difference of two trees that were built apart.
func (t *step) compare(ctx context.Context, lower, upper layout.SnapshotKey) (out outputs, err error) {
	var layers [2][]layer.Parent
	for i, key := range []layout.SnapshotKey{lower, upper} {
		if layers[i], err = t.j.b.Snaps.Layers(ctx, key); err != nil {
			return out, err
		}
	}
	var trees []overlay.Tree
	if upper != "" {
		tree, err := t.j.b.Snaps.Tree(ctx, upper)
		if err != nil {
			return out, err
		}
		trees = append(trees, tree)
	}
	files := layer.Difference(layers[0], layers[1])
	active, _, err := t.prepare(ctx, "")
	if err != nil {
		return out, err
	}
	defer func() {
		if err != nil {
			t.discard(active)
		}
	}()
	// The mount is seen by the thread that made it alone, so that one reads
	// and this one writes.
	stream, in := io.Pipe()
	read := make(chan struct{})
	go func() {
		defer close(read)
		in.CloseWithError(inMounts(t.j.b.Scratch, trees, func(dirs []string) error {
			return layer.Export(ctx, in, files, append(dirs, "")[0], layer.ExportOptions{})
		}))
	}()
	err = t.j.b.Snaps.Fill(ctx, active, stream)
	stream.CloseWithError(err)
	<-read
	if err != nil {
		return out, err
	}
	return t.commit(ctx, []layout.SnapshotKey{active})
}
