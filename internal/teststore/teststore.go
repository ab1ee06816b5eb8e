// Package teststore opens stores for tests, as far up as snapshots, and has
// the witness look at what they leave.
package teststore

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/fsck"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/snapshotter"
)

// Store is an open store.
type Store struct {
	Root    *durable.Root
	DB      *metadata.DB
	Journal *journal.Journal
	Blobs   *content.Store
	Snaps   *snapshotter.Snapshotter
}

// New makes a store for one test, which ends with [Store.End].
func New(t testing.TB) *Store {
	t.Helper()
	s, err := Open(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.End(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Open opens the store in dir, making it if need be.
func Open(ctx context.Context, dir string) (*Store, error) {
	root, err := durable.Create(dir, 0o711)
	if err != nil {
		return nil, err
	}
	if err := journal.Create(root); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	db, err := metadata.Open(root, metadata.Options{})
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	j, _, err := journal.Open(ctx, root, db)
	if err != nil {
		return nil, errors.Join(err, db.Close(), root.Close())
	}
	blobs := content.New(root, db, j)
	return &Store{root, db, j, blobs, snapshotter.New(root, db, j, blobs)}, nil
}

// Close carries out what removals are left and closes the store.
func (s *Store) Close() error {
	return errors.Join(s.Journal.Drain(context.Background()), s.Journal.Close(), s.DB.Close(), s.Root.Close())
}

// End closes the store and checks it.
func (s *Store) End() error {
	dir := s.Root.Path(".")
	if err := s.Close(); err != nil {
		return err
	}
	return Check(dir)
}

// Check has fsck look at everything in the closed store in dir. The error is
// its report.
func Check(dir string) error {
	report, err := fsck.Run(context.Background(), fsck.Options{Root: dir, Level: layout.Deep})
	if err != nil {
		return err
	}
	if report.ExitCode() == 0 {
		return nil
	}
	var text bytes.Buffer
	report.WriteText(&text)
	return errors.New("the store is not clean:\n" + text.String())
}
