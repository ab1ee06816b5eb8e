package builder

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"varve.dev/durable"
	"varve.dev/layout"
)

// A container that is removed while an image of it is made is in the image.
func TestCommitOfWhatIsRemoved(t *testing.T) {
	b := newBuilder(t)
	ctx := t.Context()
	const key = layout.SnapshotKey("container")
	container := b.DB.NewLease("the container")
	if err := errors.Join(container.Make(ctx), b.Snaps.PrepareFor(ctx, container.Node(), key, "")); err != nil {
		t.Fatal(err)
	}
	tree, err := b.Snaps.Tree(ctx, key)
	if err == nil {
		err = os.WriteFile(filepath.Join(tree.Upper, "written"), []byte("by a container"), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	removed := false
	durable.OnPoint(func(point string) {
		if point == layout.PointActiveMade && !removed {
			removed = true
			if err := errors.Join(container.Release(ctx), b.Journal.Drain(ctx)); err != nil {
				t.Error(err)
			}
		}
	})
	defer durable.OnPoint(nil)
	if _, err := b.Commit(ctx, CommitRequest{Snapshot: key, Config: []byte(`{"architecture":"amd64","os":"linux"}`)}); err != nil || !removed {
		t.Errorf("removed: %t, %v", removed, err)
	}
}
