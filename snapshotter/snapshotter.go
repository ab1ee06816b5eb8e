package snapshotter

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/filters"
	cfs "github.com/containerd/continuity/fs"

	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/internal/budget"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// Snapshotter is the snapshots of one open store.
type Snapshotter struct {
	root    *durable.Root
	db      *metadata.DB
	journal *journal.Journal
	blobs   *content.Store
	space   *budget.Budget
}

var _ snapshots.Snapshotter = (*Snapshotter)(nil)

// New returns the snapshots of the store that the arguments belong to.
func New(root *durable.Root, db *metadata.DB, j *journal.Journal, blobs *content.Store) *Snapshotter {
	return &Snapshotter{root: root, db: db, journal: j, blobs: blobs}
}

// Within makes every new tree take its bytes from a budget. To be called before
// the snapshotter is used.
func (s *Snapshotter) Within(space *budget.Budget) { s.space = space }

// Close does nothing: the store is its owner's to close.
func (s *Snapshotter) Close() error { return nil }

// Stat returns what is recorded of a snapshot. Errors: ErrNotFound.
func (s *Snapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	rec, err := s.record(ctx, layout.SnapshotKey(key))
	return infoOf(layout.SnapshotKey(key), rec), err
}

func (s *Snapshotter) record(ctx context.Context, key layout.SnapshotKey) (rec layout.SnapshotRecord, err error) {
	err = s.db.View(ctx, func(tx *metadata.Tx) error {
		rec, err = tx.Snapshots().Get(key)
		return err
	})
	return rec, err
}

func infoOf(key layout.SnapshotKey, rec layout.SnapshotRecord) snapshots.Info {
	return snapshots.Info{
		Kind: snapshots.ParseKind(string(rec.Kind)), Name: string(key), Parent: string(rec.Parent),
		Labels: rec.Labels, Created: rec.Created, Updated: rec.Updated,
	}
}

// Update changes a snapshot's labels: all of them, or with fieldpaths "labels"
// or "labels.<name>" those. Errors: ErrNotFound, ErrInvalidArgument for any
// other field.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	key := layout.SnapshotKey(info.Name)
	var out snapshots.Info
	err := s.db.Update(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Snapshots().Get(key)
		if err != nil {
			return err
		}
		if rec.Labels, err = metadata.ChangeLabels(rec.Labels, info.Labels, fieldpaths); err != nil {
			return fmt.Errorf("snapshot %q: %w", key, err)
		}
		rec.Updated = time.Now().UTC()
		out = infoOf(key, rec)
		return tx.Snapshots().Put(key, rec)
	})
	return out, err
}

// Usage returns the disk space of a snapshot alone, without its parents: of a
// committed one as it was counted once, of an active one by walking it now.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	rec, err := s.record(ctx, layout.SnapshotKey(key))
	if err != nil {
		return snapshots.Usage{}, err
	}
	switch rec.Kind {
	case layout.SnapshotCommitted:
		return snapshots.Usage{Size: rec.Size, Inodes: rec.Inodes}, nil
	case layout.SnapshotView:
		return snapshots.Usage{}, nil
	}
	du, err := cfs.DiskUsage(ctx, s.root.Path(activeTree(rec.Layer)))
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("usage of snapshot %q: %w: %w", key, err, errdefs.ErrUnavailable)
	}
	return snapshots.Usage(du), nil
}

// Walk calls fn for every snapshot that matches one of the filters, on the
// state of the store when the call began. fn may call the store.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return err
	}
	var found []snapshots.Info
	err = s.db.View(ctx, func(tx *metadata.Tx) error {
		return tx.Snapshots().Each("", func(key layout.SnapshotKey, rec layout.SnapshotRecord) error {
			if info := infoOf(key, rec); filter.Match(adapt(info)) {
				found = append(found, info)
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	for _, info := range found {
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// adapt lets filters select snapshots by kind, name, parent and labels.
func adapt(info snapshots.Info) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		if len(path) == 0 {
			return "", false
		}
		switch path[0] {
		case "kind":
			return strings.ToLower(info.Kind.String()), true
		case "name":
			return info.Name, true
		case "parent":
			return info.Parent, true
		case "labels":
			v, ok := info.Labels[strings.Join(path[1:], ".")]
			return v, ok
		}
		return "", false
	})
}

// Remove removes a snapshot that came in through containerd's interface.
// Errors: ErrNotFound; ErrFailedPrecondition while something stands on it.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	return s.RemoveFor(ctx, layout.ContainerdNode, layout.SnapshotKey(key))
}

// RemoveFor removes holder's hold on a snapshot, and with the last hold the
// snapshot. Its files are deleted in the background. Errors: ErrNotFound;
// ErrFailedPrecondition while something else needs it, naming that.
func (s *Snapshotter) RemoveFor(ctx context.Context, holder layout.Node, key layout.SnapshotKey) error {
	node := layout.SnapshotNode(key)
	err := s.db.Update(ctx, func(tx *metadata.Tx) error {
		if !tx.Snapshots().Has(key) {
			return fmt.Errorf("snapshot %q: %w", key, errdefs.ErrNotFound)
		}
		parents, err := tx.Parents(node)
		if err != nil {
			return err
		}
		for _, e := range parents {
			if e.Parent != holder {
				return fmt.Errorf("remove snapshot %q: %s needs it: %w", key, e.Parent, errdefs.ErrFailedPrecondition)
			}
		}
		return tx.Drop(node)
	})
	if err == nil {
		s.journal.Kick()
	}
	return err
}

// Prepare makes an active snapshot on parent ("" for none) that lives until
// Remove or Commit. Errors: ErrAlreadyExists, ErrNotFound for the parent,
// ErrInvalidArgument for a parent that is not committed.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.make(ctx, layout.ContainerdNode, layout.SnapshotActive, key, parent, opts)
}

// View makes a read-only snapshot of parent; otherwise as Prepare.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.make(ctx, layout.ContainerdNode, layout.SnapshotView, key, parent, opts)
}

func (s *Snapshotter) make(ctx context.Context, holder layout.Node, kind layout.SnapshotKind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	var info snapshots.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return nil, err
		}
	}
	now := time.Now().UTC()
	rec := layout.SnapshotRecord{
		Kind: kind, Parent: layout.SnapshotKey(parent), Created: now, Updated: now, Labels: info.Labels,
	}
	if err := s.create(ctx, holder, layout.SnapshotKey(key), rec); err != nil {
		return nil, err
	}
	return s.Mounts(ctx, key)
}
