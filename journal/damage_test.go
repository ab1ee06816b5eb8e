package journal_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
)

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// newStore makes an empty store and closes it.
func newStore(t *testing.T) (dir string) {
	t.Helper()
	testkit.NeedRoot(t)
	dir = t.TempDir()
	s, err := teststore.Open(t.Context(), dir)
	must(t, err)
	must(t, s.Close())
	return dir
}

// reopen opens a store by hand, for what its recovery says, and closes it.
func reopen(t *testing.T, dir string, change func(*metadata.Tx) error) journal.Recovery {
	t.Helper()
	root, err := durable.Open(dir)
	must(t, err)
	defer root.Close()
	db, err := metadata.Open(root, metadata.Options{})
	must(t, err)
	if change != nil {
		must(t, db.Update(t.Context(), change))
	}
	j, found, err := journal.Open(t.Context(), root, db)
	must(t, err)
	must(t, j.Drain(t.Context()), j.Close(), db.Close())
	return found
}

// Whatever stands in staging and ingest, the store opens and is clean.
func TestRecoveryOfStrangers(t *testing.T) {
	dir := newStore(t)
	at := func(rel ...string) string { return filepath.Join(append([]string{dir}, rel...)...) }
	must(t,
		os.WriteFile(at("staging", "file"), nil, 0o600), os.Symlink("/", at("staging", "link")),
		os.WriteFile(at("ingest", "file"), nil, 0o600), os.Symlink("/", at("ingest", "link")))
	for name, make := range map[string]func(info, data string) error{
		"fifo":      func(info, _ string) error { return unix.Mkfifo(info, 0o600) },
		"directory": func(info, _ string) error { return os.Mkdir(info, 0o700) },
		"torn":      func(info, _ string) error { return os.WriteFile(info, []byte(`{"ref":`), 0o600) },
		"elsewhere": func(info, data string) error {
			return errors.Join(os.WriteFile(info, []byte(`{"ref":"x"}`), 0o600), os.Symlink("/etc/passwd", data))
		},
	} {
		must(t, os.Mkdir(at("ingest", name), 0o700), make(at("ingest", name, layout.IngestInfo), at("ingest", name, layout.IngestData)))
	}
	reopen(t, dir, nil)
	must(t, teststore.Check(dir))
	for _, rel := range []string{"staging", "ingest"} {
		if left, err := os.ReadDir(at(rel)); err != nil || len(left) > 0 {
			t.Errorf("%s has %v, %v", rel, left, err)
		}
	}
	if _, err := os.Stat("/etc/passwd"); err != nil {
		t.Error(err)
	}
}

// A publication whose files have gone is given up. What of it was renamed
// already goes with it.
func TestIntentThatCannotBeCarriedOut(t *testing.T) {
	dir := newStore(t)
	half := layout.LayerID("half")
	must(t, os.MkdirAll(filepath.Join(dir, layout.LayerPath(half), layout.TreeDir), 0o755))
	found := reopen(t, dir, func(tx *metadata.Tx) error {
		return tx.Intents().Put("x", layout.IntentRecord{Purpose: "pull half", Layers: []layout.LayerMove{
			{ID: half, From: layout.StagingPath("boot", half)}, {ID: "nowhere", From: layout.StagingPath("boot", "nowhere")},
		}})
	})
	if len(found.GivenUp) != 1 || !strings.Contains(found.GivenUp[0], "pull half") || len(found.Finished) > 0 {
		t.Errorf("%+v", found)
	}
	must(t, teststore.Check(dir))
}

// A sweep deletes nothing that a record names, and nothing but what it is for.
func TestDamagedSweeps(t *testing.T) {
	dir := newStore(t)
	layer := layout.LayerID("recorded")
	must(t, os.MkdirAll(filepath.Join(dir, layout.LayerPath(layer), layout.TreeDir), 0o755))
	reopen(t, dir, func(tx *metadata.Tx) error {
		err := errors.Join(tx.PutLayer(layer, layout.LayerRecord{}),
			tx.Link(layout.Edge{Parent: layout.ContainerdNode, Rel: layout.RelHolds, Child: layout.LayerNode(layer)}))
		for id, s := range map[string]layout.SweepRecord{
			"a": {Path: layout.LayerPath(layer), Node: layout.LayerNode(layer), Claimed: true},
			"b": {Path: layout.VolumesDir, Node: layout.LayerNode("gone"), Claimed: true},
			"c": {Path: layout.VolumesDir, Node: layout.LayerNode("gone")},
			"d": {Path: "../" + filepath.Base(dir) + "/" + layout.VolumesDir, Node: layout.LayerNode("../volumes"), Claimed: true},
		} {
			err = errors.Join(err, tx.Sweeps().Put(id, s))
		}
		return err
	})
	for _, rel := range []string{layout.LayerPath(layer), layout.VolumesDir} {
		if _, err := os.Lstat(filepath.Join(dir, rel)); err != nil {
			t.Error(err)
		}
	}
}

// A store whose directory is not what it has to be is not opened.
func TestDirectoryElsewhere(t *testing.T) {
	dir := newStore(t)
	blobs := filepath.Join(dir, layout.BlobsDir)
	must(t, os.Rename(blobs, dir+".moved"), os.Symlink(dir+".moved", blobs))
	t.Cleanup(func() { os.RemoveAll(dir + ".moved") })
	root, err := durable.Open(dir)
	must(t, err)
	defer root.Close()
	if c := errdefs.AsCorrupt(journal.Create(root)); c == nil || c.Invariant != "R2" {
		t.Errorf("%v", c)
	}
}
