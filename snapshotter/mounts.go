package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

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

// Usable tells whether the layers that a committed snapshot stands on can be
// used, as far as a look at their directories tells; "" stands on none. Whoever
// is about to use one asks. Errors: Corrupt (L1, L4).
func (s *Snapshotter) Usable(ctx context.Context, key layout.SnapshotKey) error {
	layers := map[layout.LayerID]layout.LayerRecord{}
	err := s.db.View(ctx, func(tx *metadata.Tx) error {
		var all error
		return errors.Join(eachBelow(tx, key, func(rec layout.SnapshotRecord) {
			l, err := tx.Layers().Get(rec.Layer)
			layers[rec.Layer], all = l, errors.Join(all, err)
		}), all)
	})
	if err != nil {
		return err
	}
	for id, rec := range layers {
		if err := s.stands(id, rec); err != nil {
			return err
		}
	}
	return nil
}

func (s *Snapshotter) stands(id layout.LayerID, rec layout.LayerRecord) error {
	bad := func(invariant, detail string) error {
		return &errdefs.Corrupt{Invariant: invariant, Object: "layer " + string(id), Detail: detail}
	}
	if !rec.Damaged.IsZero() {
		return bad("L4", "it was found damaged on "+rec.Damaged.Format(time.RFC3339)+" and nothing had what is missing")
	}
	dir, err := os.OpenFile(s.root.Path(layerTree(id)), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return bad("L1", "its tree cannot be opened: "+err.Error())
	}
	defer dir.Close()
	if rec.Inodes < 2 { // the tree's own directory
		return nil
	}
	if _, err := dir.Readdirnames(1); err != nil {
		return bad("L4", fmt.Sprintf("its tree is empty, and has %d files", rec.Inodes))
	}
	return nil
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
