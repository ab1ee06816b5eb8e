// Package containers makes and removes containers in a store: the record, the
// writable snapshot and the directory that the shim is given.
//
// Owns containers/<id> and the records of containers. It must not know of
// images: it is told the snapshot to stand on. It is apart from package
// runtime so that the shim's binary does not carry the store.
//
// Invariants kept: C1, C2. Crash story: the directory and the snapshot, held
// by a lease, come first, the record last; what a crash leaves of an unrecorded
// container goes with the lease. A directory that no lease held is never
// removed.
package containers

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/runtime"
	"varve.dev/snapshotter"
)

// Store is the containers of one open store.
type Store struct {
	root    *durable.Root
	db      *metadata.DB
	journal *journal.Journal
	snaps   *snapshotter.Snapshotter
}

// New returns the containers of the store that the arguments belong to.
func New(root *durable.Root, db *metadata.DB, j *journal.Journal, snaps *snapshotter.Snapshotter) *Store {
	return &Store{root: root, db: db, journal: j, snaps: snaps}
}

// Image is what a container stands on.
type Image struct {
	Name   string
	Config []byte             // JSON; kept, since the name may get another meaning
	Top    layout.SnapshotKey // committed; "" for an image without layers
}

// Create makes a container on an image. spec's ID and Rootfs are filled in
// here. It returns the id and the directory for the shim. Errors:
// ErrAlreadyExists for a name that is taken; ErrInvalidArgument; ErrNotFound
// for the image's snapshot.
func (s *Store) Create(ctx context.Context, image Image, spec runtime.Spec) (layout.ContainerID, string, error) {
	var b [32]byte
	rand.Read(b[:])
	id := layout.ContainerID(hex.EncodeToString(b[:]))
	spec.ID = string(id)
	if spec.Hostname == "" {
		spec.Hostname = string(id[:12])
	}
	if !slices.ContainsFunc(spec.Env, func(e string) bool { return strings.HasPrefix(e, "HOSTNAME=") }) {
		spec.Env = append(spec.Env, "HOSTNAME="+spec.Hostname) // as docker does
	}
	lease := s.db.NewLease("create container " + string(id[:12]))
	defer func() {
		_ = lease.Release(ctx) // it expires
		s.journal.Kick()
	}()
	if err := lease.Hold(ctx, func(*metadata.Tx) ([]layout.Node, error) {
		return []layout.Node{layout.ContainerNode(id)}, nil
	}); err != nil {
		return "", "", err
	}
	key := layout.SnapshotKey("container:" + id)
	if err := s.snaps.PrepareFor(ctx, lease.Node(), key, image.Top); err != nil {
		return "", "", fmt.Errorf("create container: %w", err)
	}
	tree, err := s.snaps.Tree(ctx, key)
	if err != nil {
		return "", "", err
	}
	spec.Rootfs = tree
	dir := layout.ContainerPath(id)
	if err := s.root.MkdirAll(dir, 0o700); err != nil {
		return "", "", err
	}
	config, err := spec.Encode()
	if err == nil {
		err = s.root.WriteFile(path.Join(dir, layout.ContainerConfig), config, 0o600)
	}
	if err == nil {
		err = s.root.WriteFile(path.Join(dir, layout.ContainerImage), image.Config, 0o600)
	}
	if err == nil {
		// There from the beginning, so that a start can be locked out.
		err = s.root.WriteFile(path.Join(dir, layout.ContainerLock), nil, 0o600)
	}
	if err != nil {
		return "", "", err
	}
	durable.At(layout.PointContainerMade)
	if err := s.record(ctx, id, image.Name, key, spec.Name); err != nil {
		return "", "", err
	}
	return id, s.root.Path(dir), nil
}

// record makes the container real, if its name is free.
func (s *Store) record(ctx context.Context, id layout.ContainerID, image string, key layout.SnapshotKey, name string) error {
	return s.db.Update(ctx, func(tx *metadata.Tx) error {
		err := tx.Containers().Each("", func(other layout.ContainerID, c layout.ContainerRecord) error {
			if name != "" && c.Name == name {
				return fmt.Errorf("container name %q is taken by %s: %w", name, other[:12], errdefs.ErrAlreadyExists)
			}
			return nil
		})
		if err != nil {
			return err
		}
		rec := layout.ContainerRecord{Name: name, Image: image, Snapshot: key, Created: time.Now().UTC()}
		if err := tx.Containers().Put(id, rec); err != nil {
			return err
		}
		return tx.Link(layout.Edge{Parent: layout.ContainerNode(id), Rel: layout.RelRootfs, Child: layout.SnapshotNode(key)})
	})
}

// Remove removes a container with its writable layer. Errors: ErrNotFound;
// ErrFailedPrecondition while it runs.
func (s *Store) Remove(ctx context.Context, id layout.ContainerID) error {
	lock, err := s.lockOut(id)
	if err != nil {
		return err
	}
	if lock != nil {
		defer lock.Close()
	}
	err = s.db.Update(ctx, func(tx *metadata.Tx) error {
		if !tx.Containers().Has(id) {
			return fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
		}
		return tx.Drop(layout.ContainerNode(id))
	})
	if err == nil {
		s.journal.Kick()
	}
	return err
}

// lockOut takes the shim's lock, which tells whether the container runs; nil
// for one that has lost it.
func (s *Store) lockOut(id layout.ContainerID) (*os.File, error) {
	f, err := os.Open(filepath.Join(s.root.Path(layout.ContainerPath(id)), layout.ContainerLock))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("container %s: %w: %w", id, err, errdefs.ErrUnavailable)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("container %s is running: %w", id, errdefs.ErrFailedPrecondition)
	}
	return f, nil
}

// Stopped is a container that does not run and will not be started while it is
// held.
type Stopped struct {
	ID       layout.ContainerID
	Snapshot layout.SnapshotKey // its writable layer
	Config   []byte             // of its image, JSON
	lock     *os.File
}

// Close lets the container be started again.
func (h *Stopped) Close() error {
	if h.lock == nil {
		return nil
	}
	return h.lock.Close()
}

// Hold keeps a container, named by its name, its id or the beginning of it,
// from being started. Errors: ErrNotFound; ErrInvalidArgument for a beginning
// that several have; ErrFailedPrecondition while it runs.
func (s *Store) Hold(ctx context.Context, what string) (*Stopped, error) {
	h := &Stopped{}
	err := s.db.View(ctx, func(tx *metadata.Tx) (err error) {
		if h.ID, err = find(tx, what); err != nil {
			return err
		}
		rec, err := tx.Containers().Get(h.ID)
		h.Snapshot = rec.Snapshot
		return err
	})
	if err != nil {
		return nil, err
	}
	if h.lock, err = s.lockOut(h.ID); err != nil {
		return nil, err
	}
	h.Config, err = os.ReadFile(s.root.Path(path.Join(layout.ContainerPath(h.ID), layout.ContainerImage)))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("container %s: %w: %w", h.ID, err, errdefs.ErrUnavailable), h.Close())
	}
	return h, nil
}

func find(tx *metadata.Tx, what string) (found layout.ContainerID, err error) {
	var begin []layout.ContainerID
	err = tx.Containers().Each("", func(id layout.ContainerID, c layout.ContainerRecord) error {
		switch {
		case string(id) == what || c.Name == what && what != "":
			found = id
		case what != "" && strings.HasPrefix(string(id), what):
			begin = append(begin, id)
		}
		return nil
	})
	switch {
	case err != nil || found != "":
		return found, err
	case len(begin) == 1:
		return begin[0], nil
	case len(begin) > 1:
		return "", fmt.Errorf("container %q: the ids of %d containers begin like this: %w", what, len(begin), errdefs.ErrInvalidArgument)
	}
	return "", fmt.Errorf("container %q: %w", what, errdefs.ErrNotFound)
}
