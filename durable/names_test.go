package durable

import (
	"errors"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
)

// A rename never takes the place of what is there, on any file system, and
// changes nothing then.
func TestRenameReplacesNothing(t *testing.T) {
	for _, kind := range []string{"here", "tmpfs", "ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			r := newRoot(t)
			if kind != "here" {
				r = mounted(t, kind)
			}
			must(t, r.WriteFile("a", []byte("a"), 0o600))
			must(t, r.WriteFile("b", []byte("b"), 0o600))
			must(t, r.Mkdir("d", 0o700))
			must(t, r.Mkdir("empty", 0o700))
			for _, c := range [][2]string{{"a", "b"}, {"d", "empty"}, {"a", "d"}, {"d", "a"}} {
				if err := r.Rename(c[0], c[1]); !errors.Is(err, errdefs.ErrAlreadyExists) {
					t.Errorf("rename %s to %s: %v", c[0], c[1], err)
				}
				if err := r.Publish(c[0], c[1]); !errors.Is(err, errdefs.ErrAlreadyExists) {
					t.Errorf("publish %s to %s: %v", c[0], c[1], err)
				}
			}
			if read(t, r, "a") != "a" || read(t, r, "b") != "b" || !exists(r, "d") {
				t.Error("something was replaced")
			}
			if err := r.Rename("none", "c"); !errors.Is(err, errdefs.ErrNotFound) {
				t.Errorf("rename of nothing: %v", err)
			}
			must(t, r.Publish("a", "d/a"))
			if exists(r, "a") || read(t, r, "d/a") != "a" {
				t.Error("not published")
			}
		})
	}
}

func TestMkdirModes(t *testing.T) {
	needRoot(t)
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	r := newRoot(t)
	must(t, r.MkdirAll("a/b", 0o755))
	must(t, r.MkdirAll("a/b", 0o700)) // is there: stays
	must(t, r.MkdirOwned("o", os.ModeSetgid|os.ModeSticky|0o775, 12, 34))
	for name, want := range map[string]uint32{"a": 0o755, "a/b": 0o755, "o": 0o3775} {
		var st unix.Stat_t
		must(t, unix.Lstat(r.Path(name), &st))
		if st.Mode&0o7777 != want {
			t.Errorf("%s has mode %o, want %o", name, st.Mode&0o7777, want)
		}
		if name == "o" && (st.Uid != 12 || st.Gid != 34) {
			t.Errorf("%s belongs to %d:%d", name, st.Uid, st.Gid)
		}
	}
}

func TestRemoveIsIdempotent(t *testing.T) {
	r := newRoot(t)
	must(t, r.WriteFile("f", nil, 0o600))
	for range 2 {
		must(t, r.Remove("f"))
		must(t, r.RemoveAll("tree"))
	}
}

// What a container with CAP_LINUX_IMMUTABLE made immutable goes with the
// rest, and a link in the tree takes nothing else along.
func TestRemoveAllOfAnythingInATree(t *testing.T) {
	r := mounted(t, "ext4")
	must(t, r.MkdirAll("tree/d/locked", 0o000))
	must(t, r.MkdirAll("outside", 0o700))
	must(t, os.WriteFile(r.Path("outside/f"), nil, 0o600))
	must(t, os.WriteFile(r.Path("tree/d/immutable"), nil, 0o400))
	must(t, os.WriteFile(r.Path("tree/d/append"), nil, 0o400))
	must(t, os.Symlink(r.Path("outside"), r.Path("tree/link")))
	must(t, unix.Mkfifo(r.Path("tree/d/fifo"), 0o600))
	command(t, "chattr", "+i", r.Path("outside/f"))
	command(t, "chattr", "+a", r.Path("tree/d/append"))
	command(t, "chattr", "+i", r.Path("tree/d/immutable"), r.Path("tree/d"))
	t.Cleanup(func() { exec.Command("chattr", "-R", "-i", r.Path("outside")).Run() })
	must(t, r.RemoveAll("tree"))
	if exists(r, "tree") {
		t.Error("the tree is there")
	}
	if !exists(r, "outside/f") {
		t.Error("the link's target is gone")
	}
	if err := os.Remove(r.Path("outside/f")); err == nil {
		t.Error("the flag outside was taken off through the link")
	}
}

func TestSyncNames(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4"} {
		r := mounted(t, kind)
		must(t, r.Mkdir("a", 0o700))
		must(t, r.Mkdir("b", 0o700))
		var ops []Op
		r.SetObserver(observerFunc(func(op Op) { ops = append(ops, op) }))
		must(t, r.SyncNames("a", "b", "a"))
		covered := map[string]bool{}
		for _, op := range ops {
			for _, name := range append([]string{op.Path}, op.With...) {
				covered[name] = op.Kind == OpSyncDir
			}
		}
		if !covered["a"] || !covered["b"] {
			t.Errorf("%s: told %v", kind, ops)
		}
		// One flush for all on an ordered journal, one each elsewhere.
		if want := map[string]int{"tmpfs": 2, "ext4": 1}[kind]; len(ops) != want {
			t.Errorf("%s: %d flushes, want %d", kind, len(ops), want)
		}
	}
}

type observerFunc func(Op)

func (f observerFunc) Observe(op Op) { f(op) }
