package snapshotter

import (
	"context"
	"fmt"
	"os"
	"path"
	"syscall"
	"time"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// treePerm is the mode of a root directory that has no parent to take after.
const treePerm = 0o755

// PrepareFor makes an active snapshot on parent ("" for none) that lives as
// long as holder, a root that exists. Errors as [Snapshotter.Prepare].
func (s *Snapshotter) PrepareFor(ctx context.Context, holder layout.Node, key, parent layout.SnapshotKey) error {
	now := time.Now().UTC()
	return s.create(ctx, holder, key, layout.SnapshotRecord{
		Kind: layout.SnapshotActive, Parent: parent, Created: now, Updated: now,
	})
}

// create makes the directory, if the snapshot has one, and then the record.
// After an error neither is there.
func (s *Snapshotter) create(ctx context.Context, holder layout.Node, key layout.SnapshotKey, rec layout.SnapshotRecord) error {
	if err := layout.CheckName("snapshot key", string(key)); err != nil {
		return err
	}
	lowers, err := s.checkNew(ctx, key, rec.Parent)
	if err != nil {
		return err
	}
	if err := s.Usable(ctx, rec.Parent); err != nil {
		return err
	}
	// A view of nothing needs an empty directory to show.
	if rec.Kind == layout.SnapshotActive || rec.Parent == "" {
		rec.Layer = layout.LayerID(layout.NewID())
		if err := s.makeActive(rec.Layer, lowers); err != nil {
			return fmt.Errorf("snapshot %q: %w", key, err)
		}
		durable.At(layout.PointActiveMade)
	}
	err = s.db.Update(ctx, func(tx *metadata.Tx) error {
		if err := checkNewTx(tx, key, rec.Parent); err != nil {
			return err
		}
		if !tx.Exists(holder) {
			return fmt.Errorf("snapshot %q: its holder %s is gone: %w", key, holder, errdefs.ErrNotFound)
		}
		if err := tx.PutSnapshot(key, rec); err != nil {
			return err
		}
		return tx.Link(layout.Edge{Parent: holder, Rel: layout.RelHolds, Child: layout.SnapshotNode(key)})
	})
	if err != nil {
		if rec.Layer != "" {
			_ = s.root.RemoveAll(layout.ActivePath(rec.Layer))
		}
		return err
	}
	durable.At(layout.PointActiveRecorded)
	return nil
}

// Remake makes the directory of an active snapshot anew, empty, if it is not
// there: what was written to it is lost. Errors: ErrNotFound.
func (s *Snapshotter) Remake(ctx context.Context, key layout.SnapshotKey) error {
	rec, err := s.record(ctx, key)
	if err != nil || rec.Layer == "" || rec.Kind == layout.SnapshotCommitted {
		return err
	}
	if fi, err := os.Lstat(s.root.Path(activeTree(rec.Layer))); err == nil && fi.IsDir() {
		return nil
	}
	var lowers []string
	err = s.db.View(ctx, func(tx *metadata.Tx) error {
		lowers, err = s.chain(tx, rec.Parent)
		return err
	})
	if err != nil {
		return err
	}
	// What stands there without a tree holds nothing of anybody's.
	if err := s.root.RemoveAll(layout.ActivePath(rec.Layer)); err != nil {
		return err
	}
	return s.makeActive(rec.Layer, lowers)
}

// checkNew refuses early what the transaction would refuse late, and returns
// the parent's trees.
func (s *Snapshotter) checkNew(ctx context.Context, key, parent layout.SnapshotKey) (lowers []string, err error) {
	err = s.db.View(ctx, func(tx *metadata.Tx) error {
		if err := checkNewTx(tx, key, parent); err != nil {
			return err
		}
		lowers, err = s.chain(tx, parent)
		return err
	})
	return lowers, err
}

func checkNewTx(tx *metadata.Tx, key, parent layout.SnapshotKey) error {
	if tx.Snapshots().Has(key) {
		return fmt.Errorf("snapshot %q: %w", key, errdefs.ErrAlreadyExists)
	}
	if parent == "" {
		return nil
	}
	rec, err := tx.Snapshots().Get(parent)
	if err != nil {
		return fmt.Errorf("parent of snapshot %q: %w", key, err)
	}
	if rec.Kind != layout.SnapshotCommitted {
		return fmt.Errorf("parent %q of snapshot %q is not committed but %s: %w", parent, key, rec.Kind, errdefs.ErrInvalidArgument)
	}
	return nil
}

// makeActive makes active/<id>/{fs,work}, durably. The root of the new tree
// looks like the one below it, since overlayfs shows the upper directory's
// owner and mode for "/".
func (s *Snapshotter) makeActive(id layout.LayerID, lowers []string) error {
	perm, uid, gid := os.FileMode(treePerm), 0, 0
	if len(lowers) > 0 {
		fi, err := os.Lstat(lowers[0])
		if err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
		}
		st := fi.Sys().(*syscall.Stat_t)
		perm, uid, gid = fi.Mode().Perm()|fi.Mode()&(os.ModeSticky|os.ModeSetgid|os.ModeSetuid), int(st.Uid), int(st.Gid)
	}
	dir := layout.ActivePath(id)
	if err := s.root.Mkdir(dir, 0o711); err != nil {
		return err
	}
	err := s.root.MkdirOwned(path.Join(dir, layout.TreeDir), perm, uid, gid)
	if err == nil {
		err = s.root.Mkdir(path.Join(dir, layout.WorkDir), 0o711)
	}
	if err == nil {
		err = s.root.SyncNames(layout.ActiveDir, dir)
	}
	if err != nil {
		_ = s.root.RemoveAll(dir)
	}
	return err
}

func activeTree(id layout.LayerID) string {
	return path.Join(layout.ActivePath(id), layout.TreeDir)
}
