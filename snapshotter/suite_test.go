package snapshotter_test

import (
	"context"
	"errors"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/journal"
	"varve.dev/metadata"
	"varve.dev/snapshotter"
)

// opened is a store as far up as snapshots.
type opened struct {
	root    *durable.Root
	db      *metadata.DB
	journal *journal.Journal
	blobs   *content.Store
	snaps   *snapshotter.Snapshotter
}

func open(ctx context.Context, dir string) (*opened, error) {
	root, err := durable.Create(dir, 0o711)
	if err != nil {
		return nil, err
	}
	if err := journal.Create(root); err != nil {
		return nil, err
	}
	db, err := metadata.Open(root, metadata.Options{})
	if err != nil {
		return nil, err
	}
	j, _, err := journal.Open(ctx, root, db)
	if err != nil {
		return nil, err
	}
	blobs := content.New(root, db, j)
	return &opened{root, db, j, blobs, snapshotter.New(root, db, j, blobs)}, nil
}

func (o *opened) close() error {
	return errors.Join(o.journal.Drain(context.Background()), o.journal.Close(), o.db.Close(), o.root.Close())
}

// The suite's own name for a driver on overlayfs, which cannot rename a
// directory of a lower layer, is "overlayfs".
func TestContainerdSuite(t *testing.T) {
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		o, err := open(ctx, root)
		if err != nil {
			return nil, nil, err
		}
		return o.snaps, o.close, nil
	})
}
