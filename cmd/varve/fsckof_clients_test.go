//go:build clients

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"varve.dev/fsck/foreign"
	"varve.dev/internal/testkit"
)

// checkedEngine is one whose store varve fsck looks at.
type checkedEngine struct {
	start func(t *testing.T, dir string) tool
	flag  string
	root  string   // below its folder
	trees string   // pattern of the folders of layers' trees, below root
	busy  int      // exit code while it runs
	parts []string // layers of the awkward image that it cannot unpack
	how   testkit.Compression
}

var checkedEngines = map[string]checkedEngine{
	"docker": {
		start: dockerAt, flag: "--of-docker", root: "data", trees: "overlay2/*/diff",
		how: testkit.Gzip, parts: []string{"hardlinks into lower layers", "implied directories", "duplicates", "sparse"},
	},
	"containerd": {
		start: containerdAt, flag: "--of-containerd", root: "root", trees: "io.containerd.snapshotter.v1.overlayfs/snapshots/*/fs", busy: couldNotRun,
		parts: []string{"hardlinks into lower layers", "implied directories"},
	},
}

// TestClientsStoresAreChecked looks at what dockerd and containerd have made:
// nothing is wrong with it, until something is changed by hand.
func TestClientsStoresAreChecked(t *testing.T) {
	registry := testkit.Registry(t)
	base := registry.Push(t, testkit.Busybox(t), "busybox:latest")
	h := storeless(t)
	for name, e := range checkedEngines {
		t.Run(name, func(t *testing.T) {
			h.t = t
			dir := t.TempDir()
			root := filepath.Join(dir, e.root)
			awkward := registry.Push(t, testkit.AwkwardWithout(t, e.how, e.parts...), "awkward:"+name)
			t.Run("at work", func(t *testing.T) {
				c := e.start(t, dir)
				c.pull(t, base)
				c.pull(t, awkward)
				c.create(t, base)
				if c.build != nil {
					c.build(t, dockerfile(t, fmt.Sprintf(strings.NewReplacer("--link", "", "--chmod=640", "").Replace(everything), base), "mine", "mine\n"), "built:1")
				}
				if out, code := h.try("fsck", e.flag, root); code != e.busy {
					t.Errorf("while it runs: exit code %d\n%s", code, out)
				}
			})
			if report := h.checkOf(e.flag, root, 0); len(report.Findings) > 0 || report.Files < 400 || report.Layers < 9 {
				t.Errorf("of a store that nobody touched: %+v", report)
			}
			for _, d := range storeDamages {
				t.Run(d.name, func(t *testing.T) {
					h.t = t
					copied := filepath.Join(t.TempDir(), "copy")
					sh(t, "cp", "-a", root, copied)
					at := inTrees(t, filepath.Join(copied, e.trees), d.file)
					if d.do == nil {
						sh(t, "touch", "-d", "@5", at)
					} else {
						keepTimes(t, at, func() error { return d.do(at) })
					}
					report := h.checkOf(e.flag, copied, 1)
					if len(report.Findings) != 1 {
						t.Fatalf("%d findings: %+v", len(report.Findings), report.Findings)
					}
					f := report.Findings[0]
					if f.Kind != d.kind || filepath.Join(copied, f.Path) != at+d.beside || f.File != "/"+d.file+d.beside {
						t.Errorf("%+v", f)
					}
					if len(f.Images) != 1 || !strings.HasSuffix(f.Images[0], "/awkward:"+name) {
						t.Errorf("of images %q", f.Images)
					}
				})
			}
		})
	}
}

// storeDamages are done to a file of the awkward image.
var storeDamages = []struct {
	name, file string
	do         func(at string) error
	kind       foreign.Kind
	beside     string // what follows the name of the file that is found
}{
	{"truncate", "names/.whx", func(at string) error { return os.Truncate(at, 0) }, foreign.Empty, ""},
	{"cut short", "names/.whx", func(at string) error { return os.Truncate(at, 5) }, foreign.Short, ""},
	{"flip", "names/.whx", func(at string) error { return os.WriteFile(at, []byte("Not a whiteout\n"), 0) }, foreign.Altered, ""},
	{"delete", "names/.whx", os.Remove, foreign.Missing, ""},
	{"extra", "names/.whx", func(at string) error { return os.WriteFile(at+".new", nil, 0o600) }, foreign.Extra, ".new"},
	{"chmod", "attr/setuid", func(at string) error { return os.Chmod(at, 0o755) }, foreign.Mode, ""},
	{"chown", "names/.whx", func(at string) error { return os.Chown(at, 3, 4) }, foreign.Owner, ""},
	{"xattr", "attr/many", func(at string) error { return unix.Setxattr(at, "user.a", []byte("2"), 0) }, foreign.Xattr, ""},
	{"link target", "etc/dangling", func(at string) error {
		return errors.Join(os.Remove(at), os.Symlink("elsewhere", at))
	}, foreign.Target, ""},
	{"mtime", "names/.whx", nil, foreign.Time, ""},
}

// keepTimes changes a file, but not its time and its folder's.
func keepTimes(t *testing.T, at string, change func() error) {
	t.Helper()
	var before []unix.Stat_t
	names := []string{at, filepath.Dir(at)}
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			t.Fatal(err)
		}
		before = append(before, st)
	}
	if err := change(); err != nil {
		t.Fatal(err)
	}
	for i, name := range names {
		err := unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{before[i].Atim, before[i].Mtim}, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil && err != unix.ENOENT {
			t.Fatal(err)
		}
	}
}

// inTrees finds a file in the layers' trees: the lowest has it in whatever
// folder the engine chose.
func inTrees(t *testing.T, pattern, file string) string {
	t.Helper()
	trees, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	for _, tree := range trees {
		if fi, err := os.Lstat(filepath.Join(tree, file)); err == nil && fi.Mode()&os.ModeCharDevice == 0 {
			return filepath.Join(tree, file)
		}
	}
	t.Fatalf("none of %d trees has %s", len(trees), file)
	return ""
}
