package snapshotter

import (
	"context"
	"fmt"
	"io"

	"varve.dev/errdefs"
	"varve.dev/layer"
	"varve.dev/layout"
)

// Capture makes name a committed snapshot of what the active snapshot from
// holds at the moment, on the same parent. from stays as it is; nobody may
// write to it meanwhile. name lives as long as holder, a root that exists, or
// any other reference to it.
//
// Errors: ErrNotFound; ErrAlreadyExists for the name; ErrFailedPrecondition if
// from is not active; ErrInvalidArgument for a file that no layer can hold.
func (s *Snapshotter) Capture(ctx context.Context, holder layout.Node, name, from layout.SnapshotKey) (err error) {
	rec, err := s.record(ctx, from)
	if err != nil {
		return err
	}
	if rec.Kind != layout.SnapshotActive {
		return fmt.Errorf("capture snapshot %q: it is not active but %s: %w", from, rec.Kind, errdefs.ErrFailedPrecondition)
	}
	dir := s.root.Path(activeTree(rec.Layer))
	files, err := layer.Walk(ctx, dir, layer.WalkOptions{})
	if err != nil {
		return fmt.Errorf("capture snapshot %q: %w", from, err)
	}
	work := layout.SnapshotKey("capture:" + layout.NewID())
	if err := s.PrepareFor(ctx, holder, work, rec.Parent); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = s.RemoveFor(context.WithoutCancel(ctx), holder, work) // its holder's end does it too
		}
	}()
	stream, in := io.Pipe()
	read := make(chan struct{})
	go func() {
		defer close(read)
		in.CloseWithError(layer.Export(ctx, in, files, dir, layer.ExportOptions{}))
	}()
	err = s.Fill(ctx, work, stream)
	stream.CloseWithError(err)
	<-read
	if err != nil {
		return fmt.Errorf("capture snapshot %q: %w", from, err)
	}
	return s.CommitFor(ctx, holder, name, work, nil)
}
