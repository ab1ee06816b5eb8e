package durable

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
)

func TestCreateMakesParentsAndOpensAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a/b/c")
	for range 2 {
		r, err := Create(dir, 0o711)
		must(t, err)
		if r.Path("x/y") != filepath.Join(dir, "x/y") {
			t.Errorf("path %s", r.Path("x/y"))
		}
		must(t, r.Close())
	}
	if _, err := Open(filepath.Join(dir, "none")); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("open what is not there: %v", err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	if _, err := Open(filepath.Join(dir, "file")); err == nil {
		t.Error("a file opens as a root")
	}
}

// changes is every method that changes something, on a name that exists or
// not.
func changes(r *Root, rel string) map[string]func() error {
	return map[string]func() error{
		"CreateFile": func() error { _, err := r.CreateFile(rel, 0o600); return err },
		"AppendFile": func() error { _, err := r.AppendFile(rel, 0o600); return err },
		"WriteFile":  func() error { return r.WriteFile(rel, nil, 0o600) },
		"Mkdir":      func() error { return r.Mkdir(rel, 0o700) },
		"MkdirAll":   func() error { return r.MkdirAll(rel+"/sub", 0o700) },
		"MkdirOwned": func() error { return r.MkdirOwned(rel, 0o700, 1, 1) },
		"Rename to":  func() error { return r.Rename("there", rel) },
		"Rename":     func() error { return r.Rename(rel, "elsewhere") },
		"Publish":    func() error { return r.Publish("there", rel) },
		"Remove":     func() error { return r.Remove(rel) },
		"RemoveAll":  func() error { return r.RemoveAll(rel) },
		"SyncDirs":   func() error { return r.SyncDirs(rel) },
		"SyncNames":  func() error { return r.SyncNames(rel, ".") },
		"NewTree":    func() error { _, err := r.NewTree(rel, r.NewBarrier()); return err },
	}
}

// Names that lead out of the root are refused, and nothing out there changes.
func TestNamesStayInTheRoot(t *testing.T) {
	for _, rel := range []string{"../out", "/etc", "a/../../out", "..", "", "x/../.."} {
		r := newRoot(t)
		must(t, os.WriteFile(r.Path("there"), nil, 0o600))
		outside := filepath.Join(filepath.Dir(r.Path(".")), "out")
		must(t, os.Mkdir(outside, 0o700))
		for name, change := range changes(r, rel) {
			if name == "MkdirAll" && rel == "" {
				continue // "/sub" is tested by "/etc"
			}
			if err := change(); !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("%s(%q): %v", name, rel, err)
			}
		}
		entries, err := os.ReadDir(outside)
		must(t, err)
		if len(entries) > 0 || !exists(r, "there") {
			t.Errorf("%q changed something", rel)
		}
	}
}

// After a failed sync no method changes anything, however the disk feels
// later; what was opened before does not write either.
func TestPoison(t *testing.T) {
	r := newRoot(t)
	before, err := r.CreateFile("before", 0o600)
	must(t, err)
	f, err := r.CreateFile("f", 0o600)
	must(t, err)
	must(t, os.WriteFile(r.Path("there"), nil, 0o600))
	// A descriptor that can be written and not synced stands for a disk
	// that fails.
	var pipe [2]int
	must(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	must(t, unix.Dup3(pipe[1], int(f.f.Fd()), unix.O_CLOEXEC))
	if err := f.Sync(); !errors.Is(err, errdefs.ErrPoisoned) || !strings.Contains(err.Error(), r.Path("f")) {
		t.Errorf("sync: %v", err)
	}
	first := r.Poisoned()
	r.Poison(errors.New("another"))
	if got := r.Poisoned(); got.Error() != first.Error() {
		t.Errorf("the first cause is gone: %v", got)
	}
	for name, change := range changes(r, "x") {
		if err := change(); !errors.Is(err, errdefs.ErrPoisoned) || !errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, err := range map[string]error{
		"Write":    func() error { _, err := before.Write([]byte("x")); return err }(),
		"Truncate": before.Truncate(0),
		"Sync":     before.Sync(),
		"Wait":     r.NewBarrier().Wait(),
	} {
		if !errors.Is(err, errdefs.ErrPoisoned) {
			t.Errorf("%s: %v", name, err)
		}
	}
	entries, err := os.ReadDir(r.Path("."))
	must(t, err)
	if len(entries) != 3 {
		t.Errorf("the root holds %v", entries)
	}
	// Opened anew it is a root like any other.
	again, err := Open(r.Path("."))
	must(t, err)
	defer again.Close()
	must(t, again.Mkdir("x", 0o700))
}

func TestErrorKinds(t *testing.T) {
	r := newRoot(t)
	must(t, r.MkdirAll("d/e", 0o700))
	for name, c := range map[string]struct{ err, kind error }{
		"exists":    {r.Mkdir("d", 0o700), errdefs.ErrAlreadyExists},
		"parent":    {r.Mkdir("no/d", 0o700), errdefs.ErrNotFound},
		"not empty": {r.Remove("d"), errdefs.ErrAlreadyExists},
		"sync none": {r.SyncDirs("none"), errdefs.ErrNotFound},
	} {
		if !errors.Is(c.err, c.kind) {
			t.Errorf("%s: %v, want kind %v", name, c.err, c.kind)
		}
	}
	if err := r.Poisoned(); err != nil {
		t.Errorf("a missing name poisoned the root: %v", err)
	}
}

func TestFaultPoints(t *testing.T) {
	var seen []string
	OnPoint(func(p string) { seen = append(seen, p) })
	At("one")
	OnPoint(nil)
	At("two")
	if len(seen) != 1 || seen[0] != "one" {
		t.Errorf("seen %v", seen)
	}
}
