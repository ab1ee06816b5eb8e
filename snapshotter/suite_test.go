package snapshotter_test

import (
	"context"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"varve.dev/internal/teststore"
)

// The suite's own name for a driver on overlayfs, which cannot rename a
// directory of a lower layer, is "overlayfs".
func TestContainerdSuite(t *testing.T) {
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		o, err := teststore.Open(ctx, root)
		if err != nil {
			return nil, nil, err
		}
		return o.Snaps, o.End, nil
	})
}
