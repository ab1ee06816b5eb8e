package snapshotter

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/overlay"
)

// Tree returns where the parts of a snapshot stand. A committed snapshot's own
// layer is the first of Lowers. Errors: ErrNotFound, Corrupt (S1).
func (s *Snapshotter) Tree(ctx context.Context, key layout.SnapshotKey) (overlay.Tree, error) {
	var t overlay.Tree
	err := s.db.View(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Snapshots().Get(key)
		if err != nil {
			return err
		}
		if rec.Kind == layout.SnapshotCommitted {
			t.Lowers, err = s.chain(tx, key)
			return err
		}
		if t.Lowers, err = s.chain(tx, rec.Parent); err != nil {
			return err
		}
		switch {
		case rec.Kind == layout.SnapshotActive:
			t.Upper = s.root.Path(activeTree(rec.Layer))
			t.Work = s.root.Path(path.Join(layout.ActivePath(rec.Layer), layout.WorkDir))
		case rec.Parent == "":
			t.Lowers = []string{s.root.Path(activeTree(rec.Layer))}
		}
		return nil
	})
	return t, err
}

// maxChain ends a walk through parents that damage has bent into a circle.
// overlayfs takes at most 500 layers (OVL_MAX_STACK in fs/overlayfs/super.c).
const maxChain = 500

// chain returns the trees of a committed snapshot and all below it. Of a layer
// that comes several times only the topmost shows anything: overlayfs would
// refuse the others (ELOOP).
func (s *Snapshotter) chain(tx *metadata.Tx, key layout.SnapshotKey) (trees []string, err error) {
	err = eachBelow(tx, key, func(rec layout.SnapshotRecord) {
		if tree := s.root.Path(layerTree(rec.Layer)); !slices.Contains(trees, tree) {
			trees = append(trees, tree)
		}
	})
	return trees, err
}

// eachBelow calls fn for a committed snapshot and all that it stands on, the
// topmost first; for none if key is "".
func eachBelow(tx *metadata.Tx, key layout.SnapshotKey, fn func(layout.SnapshotRecord)) error {
	n := 0
	for at := key; at != ""; n++ {
		rec, err := tx.Snapshots().Get(at)
		if err != nil {
			return fmt.Errorf("chain of snapshot %q: %w", key, err)
		}
		if n == maxChain {
			return fmt.Errorf("snapshot %q stands on more than %d layers, the most that overlayfs can stack: %w", key, maxChain, errdefs.ErrFailedPrecondition)
		}
		fn(rec)
		at = rec.Parent
	}
	return nil
}

func layerTree(id layout.LayerID) string { return path.Join(layout.LayerPath(id), layout.TreeDir) }

// Mounts returns how to mount a snapshot, in containerd's terms. The option
// string is past a page for more than some thirty layers; containerd's mount
// package, and varve's own shim, know how to mount those.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	rec, err := s.record(ctx, layout.SnapshotKey(key))
	if err != nil {
		return nil, err
	}
	if rec.Kind == layout.SnapshotCommitted {
		return nil, fmt.Errorf("snapshot %q is committed; make a view of it to mount it: %w", key, errdefs.ErrInvalidArgument)
	}
	t, err := s.Tree(ctx, layout.SnapshotKey(key))
	if err != nil {
		return nil, err
	}
	switch {
	case t.Upper != "" && len(t.Lowers) == 0:
		return bind(t.Upper, "rw"), nil
	case t.Upper == "" && len(t.Lowers) == 1:
		return bind(t.Lowers[0], "ro"), nil
	}
	options := overlay.Options()
	if t.Upper != "" {
		options = append(options, "workdir="+t.Work, "upperdir="+t.Upper)
	}
	options = append(options, "lowerdir="+strings.Join(t.Lowers, ":"))
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}, nil
}

func bind(dir, mode string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: dir, Options: []string{"rbind", mode}}}
}
