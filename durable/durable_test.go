package durable_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"varve.dev/durable"
	"varve.dev/errdefs"
)

func open(t *testing.T) *durable.Root {
	t.Helper()
	r, err := durable.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func TestNamesStayInTheRoot(t *testing.T) {
	r := open(t)
	for _, name := range []string{"../x", "/x", "a/../../x", ""} {
		if err := r.Mkdir(name, 0o755); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("mkdir %q: %v", name, err)
		}
		if err := r.WriteFile(name, nil, 0o600); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("write %q: %v", name, err)
		}
	}
}

func TestRenameReplacesNothing(t *testing.T) {
	r := open(t)
	for _, name := range []string{"a", "b"} {
		if err := r.WriteFile(name, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Rename("a", "b"); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("rename onto a file: %v", err)
	}
	if err := r.Rename("nothing", "c"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("rename of nothing: %v", err)
	}
	if data, err := os.ReadFile(r.Path("b")); err != nil || string(data) != "b" {
		t.Errorf("b holds %q, %v", data, err)
	}
}

func TestWriteFileReplacesWhole(t *testing.T) {
	r := open(t)
	for _, text := range []string{"first and longer", "second"} {
		if err := r.WriteFile("f", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if data, err := os.ReadFile(r.Path("f")); err != nil || string(data) != text {
			t.Errorf("holds %q, %v; want %q", data, err, text)
		}
	}
	entries, err := os.ReadDir(r.Path("."))
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestPoisonEndsEverything(t *testing.T) {
	r := open(t)
	r.Poison(errors.New("the disk said no"))
	f := func(what string, err error) {
		if !errors.Is(err, errdefs.ErrPoisoned) || !strings.Contains(err.Error(), "the disk said no") {
			t.Errorf("%s after a failed sync: %v", what, err)
		}
	}
	f("mkdir", r.Mkdir("d", 0o755))
	f("write", r.WriteFile("f", nil, 0o600))
	f("rename", r.Rename("a", "b"))
	f("sync", r.SyncDirs("."))
	f("barrier", r.NewBarrier().Wait())
	_, err := r.CreateFile("f", 0o600)
	f("create", err)
}

// More files than the barrier's window of descriptors.
func TestBarrierOfManyFiles(t *testing.T) {
	r := open(t)
	b := r.NewBarrier()
	for i := range 2500 {
		f, err := r.CreateFile(fmt.Sprintf("f%d", i), 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := f.Seal(b, 0o444); err != nil {
			t.Fatal(err)
		}
	}
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil || len(open) > 1100 {
		t.Errorf("%d descriptors are open, %v", len(open), err)
	}
	if err := b.Wait("."); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(r.Path("f7")); err != nil || fi.Mode().Perm() != 0o444 {
		t.Errorf("a sealed file: %v, %v", fi, err)
	}
}

// A tree resolves names as if it were the root of the system: whatever links
// a stream brings, nothing outside changes.
func TestTreeNeverLeavesItself(t *testing.T) {
	outside := t.TempDir()
	r := open(t)
	if err := r.Mkdir("tree", 0o755); err != nil {
		t.Fatal(err)
	}
	b := r.NewBarrier()
	tree, err := r.NewTree("tree", b)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	attr := durable.Attr{Mode: 0o644, UID: os.Getuid(), GID: os.Getgid()}
	for name, target := range map[string]string{"absolute": outside, "relative": "../../../../../../../.." + outside, "loop": "loop"} {
		if err := tree.Symlink(name, target, attr); err != nil {
			t.Fatal(err)
		}
		_, _, err := tree.File(name+"/planted", attr, strings.NewReader("x"), false, make([]byte, 16))
		if name == "loop" && err == nil {
			t.Error("a name through a loop of links was resolved")
		}
	}
	entries, err := os.ReadDir(outside)
	if err != nil || len(entries) > 0 {
		t.Errorf("outside of the tree: %v, %v", entries, err)
	}
	if _, err := os.Stat(filepath.Join(r.Path("tree"), outside, "planted")); err != nil {
		t.Errorf("the file is not where the link leads inside: %v", err)
	}
	if err := tree.Link("hard", "../../etc/passwd"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("a hard link out of the tree: %v", err)
	}
	if err := b.Wait(); err != nil {
		t.Fatal(err)
	}
}
