package durable

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_ROOT") == "1" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newRoot(t testing.TB) *Root {
	t.Helper()
	r, err := Create(filepath.Join(t.TempDir(), "root"), 0o711)
	must(t, err)
	t.Cleanup(func() { r.Close() })
	return r
}

func read(t testing.TB, r *Root, rel string) string {
	t.Helper()
	data, err := os.ReadFile(r.Path(rel))
	must(t, err)
	return string(data)
}

func exists(r *Root, rel string) bool {
	_, err := os.Lstat(r.Path(rel))
	return err == nil
}

// mounted returns a root on a fresh file system of this kind.
func mounted(t testing.TB, kind string) *Root {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	if kind == "tmpfs" {
		must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"))
	} else {
		img := filepath.Join(t.TempDir(), "disk")
		must(t, os.WriteFile(img, nil, 0o600))
		must(t, os.Truncate(img, 320<<20))
		command(t, "mkfs."+kind, "-q", img)
		command(t, "mount", "-o", "loop", img, dir)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	r, err := Open(dir)
	must(t, err)
	t.Cleanup(func() { r.Close() })
	return r
}

func command(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}
