package snapshotter_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/overlay"
)

// stream is a layer of these files: "dir/", "-gone", "name=contents".
func stream(t *testing.T, files ...string) ([]byte, layout.DiffID) {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		name, data, _ := strings.Cut(f, "=")
		h := &tar.Header{Name: name, Mode: 0o755, Size: int64(len(data)), Typeflag: tar.TypeReg}
		if strings.HasSuffix(name, "/") {
			h.Typeflag = tar.TypeDir
		} else if gone, ok := strings.CutPrefix(name, "-"); ok {
			h.Name = filepath.Join(filepath.Dir(gone), ".wh."+filepath.Base(gone))
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), layout.DiffID(digest.FromBytes(buf.Bytes()))
}

func unpacked(t *testing.T, o *teststore.Store, layers ...[]string) layout.SnapshotKey {
	t.Helper()
	var streams [][]byte
	var diffs []layout.DiffID
	for _, files := range layers {
		s, d := stream(t, files...)
		streams, diffs = append(streams, s), append(diffs, d)
	}
	return unpackStreams(t, o, streams, diffs)
}

// contents lists the files of a mounted snapshot with what is in them.
func contents(t *testing.T, o *teststore.Store, key layout.SnapshotKey) (out []string) {
	t.Helper()
	tree, err := o.Snaps.Tree(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := overlay.Mount(tree, dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	err = filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(p)
		out = append(out, strings.TrimPrefix(p, dir+"/")+"="+string(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// An image may have the same layer several times: it is one tree, which
// overlayfs takes once. What shows is what the topmost of them shows.
func TestTheSameLayerTwice(t *testing.T) {
	testkit.NeedRoot(t)
	o := teststore.New(t)
	first := []string{"dir/", "dir/a=first", "b=first", "-c"}
	top := unpacked(t, o, []string{"c=lowest"}, first, []string{"dir/", "-dir/a", "b=second", "c=second"}, first, []string{"d=third"})
	want := []string{"b=first", "d=third", "dir/a=first"}
	if got := contents(t, o, top); !slices.Equal(got, want) {
		t.Errorf("shown: %v, want %v", got, want)
	}
	ids, err := o.Snaps.LayerIDs(t.Context(), top)
	if err != nil || len(ids) != 5 || ids[1] != ids[3] {
		t.Errorf("layers %v, %v", ids, err)
	}
}

func TestStack(t *testing.T) {
	testkit.NeedRoot(t)
	o := teststore.New(t)
	base := unpacked(t, o, []string{"dir/", "dir/a=base", "b=base"})
	other, err := o.Snaps.LayerIDs(t.Context(), unpacked(t, o, []string{"dir/", "dir/x=other", "y=other"}, []string{"-b", "-y"}))
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Snaps.Stack(t.Context(), layout.ContainerdNode, "stacked", base, other, nil); err != nil {
		t.Fatal(err)
	}
	want := []string{"dir/a=base", "dir/x=other"}
	if got := contents(t, o, "stacked"); !slices.Equal(got, want) {
		t.Errorf("shown: %v, want %v", got, want)
	}
	// It goes, and what it stood on stays.
	if err := o.Snaps.Remove(t.Context(), "stacked"); err != nil {
		t.Fatal(err)
	}
	if err := o.Journal.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := contents(t, o, base); !slices.Equal(got, []string{"b=base", "dir/a=base"}) {
		t.Errorf("the base shows %v", got)
	}
	for _, c := range []struct {
		name, parent layout.SnapshotKey
		layers       []layout.LayerID
		want         error
	}{
		{"x", base, nil, errdefs.ErrInvalidArgument},
		{"x", "nowhere", other, errdefs.ErrNotFound},
		{"x", base, []layout.LayerID{"nowhere"}, errdefs.ErrNotFound},
		{base, base, other, errdefs.ErrAlreadyExists},
		{"x", base, make([]layout.LayerID, 500), errdefs.ErrFailedPrecondition},
	} {
		if err := o.Snaps.Stack(t.Context(), layout.ContainerdNode, c.name, c.parent, c.layers, nil); !errors.Is(err, c.want) {
			t.Errorf("stack %d layers on %q as %q: %v, want %v", len(c.layers), c.parent, c.name, err, c.want)
		}
	}
}

// Kernels differ in what they mark as opaque; what is committed does not.
func TestCommitDropsNeedlessOpaques(t *testing.T) {
	testkit.NeedRoot(t)
	o := teststore.New(t)
	base := unpacked(t, o, []string{"old/", "old/a=base", "file=base", "gone/"}, []string{"-gone"})
	if err := o.Snaps.PrepareFor(t.Context(), layout.ContainerdNode, "active", base); err != nil {
		t.Fatal(err)
	}
	tree, err := o.Snaps.Tree(t.Context(), "active")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"old", "new", "new/deeper", "file", "gone"} {
		p := filepath.Join(tree.Upper, name)
		if err := os.Mkdir(p, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Setxattr(p, "trusted.overlay.opaque", []byte("y"), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := o.Snaps.Commit(t.Context(), "committed", "active"); err != nil {
		t.Fatal(err)
	}
	layers, err := o.Snaps.Layers(t.Context(), "committed")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range layers[0].Manifest.Entries {
		if want := e.Names[0] == "old"; e.IsOpaque() != want {
			t.Errorf("%s: opaque %t, want %t", e.Names[0], e.IsOpaque(), want)
		}
	}
}

// A publication that fails when its intent is recorded leaves its files to the
// journal, and what it stands on, whatever its caller does: the next opening
// finishes it.
func TestCommitThatFailsHalfWay(t *testing.T) {
	testkit.NeedRoot(t)
	for _, giveUp := range []bool{false, true} {
		dir := t.TempDir()
		o, err := teststore.Open(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		lease := o.DB.NewLease("a build")
		if err := lease.Make(t.Context()); err != nil {
			t.Fatal(err)
		}
		written(t, o, lease.Node(), "active", "", "below")
		if err := o.Snaps.CommitFor(t.Context(), lease.Node(), "base", "active", nil); err != nil {
			t.Fatal(err)
		}
		written(t, o, lease.Node(), "active", "base", "f")
		withoutBlobs(t, dir, func() {
			err := o.Snaps.CommitFor(t.Context(), lease.Node(), "committed", "active", func(in *layout.IntentRecord) {
				now := time.Now().UTC()
				in.Cache = []layout.CacheMake{{Key: "step", Record: layout.CacheRecord{
					Snapshots: []layout.SnapshotKey{"committed"}, Created: now, LastUse: now,
				}}}
			})
			if !errors.Is(err, journal.ErrIntended) {
				t.Errorf("commit without a place for blobs: %v", err)
			}
		})
		if giveUp {
			err := o.Snaps.RemoveFor(t.Context(), lease.Node(), "active")
			if errors.Is(err, errdefs.ErrNotFound) {
				err = nil // a round of the sweeper has finished the commit
			}
			if err := errors.Join(err, lease.Release(t.Context())); err != nil {
				t.Fatal(err)
			}
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
		if o, err = teststore.Open(t.Context(), dir); err != nil {
			t.Fatalf("given up: %t: %v", giveUp, err)
		}
		if got := contents(t, o, "committed"); !slices.Equal(got, []string{"below=kept", "f=kept"}) {
			t.Errorf("given up: %t; shown: %v", giveUp, got)
		}
		if err := o.End(); err != nil {
			t.Errorf("given up: %t: %v", giveUp, err)
		}
	}
}

// written makes a writable snapshot with one file.
func written(t *testing.T, o *teststore.Store, holder layout.Node, key, on layout.SnapshotKey, file string) {
	t.Helper()
	if err := o.Snaps.PrepareFor(t.Context(), holder, key, on); err != nil {
		t.Fatal(err)
	}
	tree, err := o.Snaps.Tree(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree.Upper, file), []byte("kept"), 0o644); err != nil {
		t.Fatal(err)
	}
}

// withoutBlobs runs fn while no blob can get its name.
func withoutBlobs(t *testing.T, dir string, fn func()) {
	t.Helper()
	blobs := filepath.Join(dir, "blobs", "sha256")
	moved := blobs + ".moved"
	if err := errors.Join(os.Rename(blobs, moved), os.WriteFile(blobs, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	fn()
	if err := errors.Join(os.Remove(blobs), os.Rename(moved, blobs)); err != nil {
		t.Fatal(err)
	}
}
