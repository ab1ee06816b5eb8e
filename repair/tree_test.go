package repair_test

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
)

// host is a store with images in it, closed between the steps of a test.
type host struct {
	root, state, remote string
	trees               map[string]string // layer → hash
	registry            *testkit.RegistryServer
}

func newHost(t *testing.T) *host {
	t.Helper()
	return newHostAt(t, t.TempDir())
}

func newHostAt(t *testing.T, root string) *host {
	t.Helper()
	testkit.NeedRoot(t)
	registry := testkit.Registry(t)
	registry.Push(t, testkit.Stacked(t, 4, 30), "stacked:1")
	registry.Push(t, testkit.Busybox(t), "busybox:1")
	h := &host{root: root, state: t.TempDir(), remote: registry.Addr, registry: registry}
	t.Setenv("VARVE_RUNTIME", filepath.Join(testkit.Binaries(t), "varve-runtime"))
	h.with(t, func(ctx context.Context, e *daemon.Engine) {
		h.pull(t, e, "stacked:1")
		h.pull(t, e, "busybox:1")
	})
	h.trees = h.hash(t)
	return h
}

func (h *host) with(t *testing.T, fn func(context.Context, *daemon.Engine)) {
	t.Helper()
	e, err := daemon.Open(t.Context(), daemon.Options{Root: h.root, State: h.state})
	if err != nil {
		t.Fatal(err)
	}
	fn(t.Context(), e)
	if err := e.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

func (h *host) pull(t *testing.T, e *daemon.Engine, name string) {
	t.Helper()
	_, err := e.Pull(t.Context(), varve.PullRequest{Reference: h.remote + "/" + name, Registry: varve.Registry{PlainHTTP: true}}, nil)
	if err != nil {
		t.Error(err)
	}
}

// repair repairs and returns the whole answer.
func (h *host) repair(t *testing.T) (r varve.FsckReport) {
	t.Helper()
	h.with(t, func(ctx context.Context, e *daemon.Engine) {
		var err error
		if r, err = e.Fsck(ctx, varve.FsckRequest{Level: string(layout.Deep), Repair: true}, nil); err != nil {
			t.Fatal(err)
		}
	})
	return r
}

func (h *host) hash(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	layers, err := os.ReadDir(filepath.Join(h.root, layout.LayersDir))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		if out[l.Name()], err = testkit.HashTree(h.tree(l.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func (h *host) tree(id string) string {
	return filepath.Join(h.root, layout.LayersDir, id, layout.TreeDir)
}

// find returns the path of a name in whatever layer has it.
func (h *host) find(t *testing.T, name string) string {
	t.Helper()
	for id := range h.trees {
		if _, err := os.Lstat(filepath.Join(h.tree(id), name)); err == nil {
			return filepath.Join(h.tree(id), name)
		}
	}
	t.Fatalf("no layer has %s", name)
	return ""
}

// whole says what is wrong with the store after a repair.
func (h *host) whole(t *testing.T, r varve.FsckReport) {
	t.Helper()
	if r.ExitCode != 0 {
		t.Errorf("exit code %d:\n%s", r.ExitCode, r.Text)
	}
	if err := teststore.Check(h.root); err != nil {
		t.Error(err)
	}
	for id, hash := range h.hash(t) {
		if h.trees[id] != hash {
			t.Errorf("layer %s is not what it was:\n%s", id, r.Text)
		}
	}
}

// damages are by what a file of a layer can become. file is a regular file
// with a second name beside it where dir is made for.
var damages = map[string]func(at func(string) string) error{
	"truncated":   func(at func(string) string) error { return os.Truncate(at("f0003"), 3) },
	"bit flipped": func(at func(string) string) error { return flip(at("f0003")) },
	"zeroed":      func(at func(string) string) error { return zero(at("f0003")) },
	"deleted":     func(at func(string) string) error { return os.Remove(at("f0003")) },
	"mode":        func(at func(string) string) error { return os.Chmod(at("f0003"), 0o777) },
	"setuid":      func(at func(string) string) error { return os.Chmod(at("f0003"), 0o755|fs.ModeSetuid) },
	"owner":       func(at func(string) string) error { return os.Chown(at("f0003"), 7, 8) },
	"time":        func(at func(string) string) error { return unix.Utimes(at("f0003"), make([]unix.Timeval, 2)) },
	"xattr gone":  func(at func(string) string) error { return unix.Removexattr(at("f0003"), "user.note") },
	"xattr more":  func(at func(string) string) error { return unix.Setxattr(at("f0003"), "user.more", []byte("x"), 0) },
	"extra file":  func(at func(string) string) error { return os.WriteFile(at("extra"), []byte("x"), 0o644) },
	"extra tree":  func(at func(string) string) error { return os.MkdirAll(at("more/and/more"), 0o755) },
	"is a dir": func(at func(string) string) error {
		return errors.Join(os.Remove(at("f0003")), os.Mkdir(at("f0003"), 0o755))
	},
	"is a link": func(at func(string) string) error { return relink(at("f0003"), "/etc/passwd") },
	"is a device": func(at func(string) string) error {
		return errors.Join(os.Remove(at("f0003")), unix.Mknod(at("f0003"), unix.S_IFCHR, 0))
	},
	"another link": func(at func(string) string) error {
		return errors.Join(os.Remove(at("f0004")), os.Link(at("f0005"), at("f0004")))
	},
	"link broken": func(at func(string) string) error {
		data, err := os.ReadFile(at("f0007.link"))
		return errors.Join(err, os.Remove(at("f0007.link")), os.WriteFile(at("f0007.link"), data, 0o640))
	},
	"linked, flipped": func(at func(string) string) error { return flip(at("f0007")) },
	"dir gone":        func(at func(string) string) error { return os.RemoveAll(at(".")) },
	"dir mode":        func(at func(string) string) error { return os.Chmod(at("."), 0o700) },
	"dir is a link":   func(at func(string) string) error { return relink(at("."), "/etc") },
	"dir is a file": func(at func(string) string) error {
		return errors.Join(os.RemoveAll(at(".")), os.WriteFile(at("."), nil, 0o644))
	},
	"top gone":          func(at func(string) string) error { return os.RemoveAll(at("..")) },
	"layer gone":        func(at func(string) string) error { return os.RemoveAll(at("../../..")) },
	"layer's tree gone": func(at func(string) string) error { return os.RemoveAll(at("../..")) },
	"layer is a file": func(at func(string) string) error {
		return errors.Join(os.RemoveAll(at("../..")), os.WriteFile(at("../.."), nil, 0o644))
	},
	"whiteout is a file": func(at func(string) string) error {
		name := at("../../layer01/d000/f0001")
		return errors.Join(os.Remove(name), os.WriteFile(name, []byte("back again"), 0o644))
	},
	"whiteout gone": func(at func(string) string) error { return os.Remove(at("../../layer01/d000/f0001")) },
	"not opaque": func(at func(string) string) error {
		return unix.Removexattr(at("../../layer01/d001"), "trusted.overlay.opaque")
	},
	"opaque": func(at func(string) string) error {
		return unix.Setxattr(at("."), "trusted.overlay.opaque", []byte("y"), 0)
	},
}

func flip(name string) error {
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	data[len(data)/2] ^= 4
	return overwrite(name, data)
}

func zero(name string) error {
	fi, err := os.Stat(name)
	if err != nil {
		return err
	}
	return overwrite(name, make([]byte, fi.Size()))
}

func overwrite(name string, data []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	return errors.Join(err, f.Close())
}

func relink(name, target string) error {
	return errors.Join(os.RemoveAll(name), os.Symlink(target, name))
}

// TestEveryDamageHeals damages a layer in each way. With its blob kept nothing
// is fetched, and the tree is what it was to the last attribute.
func TestEveryDamageHeals(t *testing.T) {
	h := newHost(t)
	passwd, err := testkit.HashTree("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range slices.Sorted(maps.Keys(damages)) {
		ok := t.Run(kind, func(t *testing.T) {
			dir := filepath.Dir(h.find(t, "layer02/d000/f0003"))
			if err := damages[kind](func(name string) string { return filepath.Join(dir, name) }); err != nil {
				t.Fatal(err)
			}
			r := h.repair(t)
			h.whole(t, r)
			if !strings.Contains(string(r.Plan), `"healed":true`) {
				t.Errorf("nothing was repaired:\n%s", r.Text)
			}
			if strings.Contains(string(r.Plan), `"fetched"`) {
				t.Errorf("something was fetched:\n%s", r.Text)
			}
		})
		if !ok {
			break // the store is not what the others count on
		}
	}
	if now, err := testkit.HashTree("/etc/passwd"); err != nil || now != passwd {
		t.Errorf("a file outside of the store was changed (%v)", err)
	}
}
