package foreign_test

import (
	"archive/tar"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"varve.dev/fsck/foreign"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// bitOfAll is an image of two layers with every kind of thing in them.
func bitOfAll(t *testing.T) testkit.Image {
	t.Helper()
	l, err := testkit.NewLayout(t.TempDir())
	must(t, err)
	base, err := l.AddLayer(testkit.Gzip, "base", func(b *testkit.LayerBuilder) {
		b.Dir("d", 0o750, testkit.Owner(7, 8))
		b.File("d/file", 0o640, []byte("contents of a file\n"), testkit.Owner(7, 8), testkit.Xattr("user.colour", "grey"))
		b.Hardlink("hard", "d/file", testkit.Mode(0o640), testkit.Owner(7, 8))
		b.Text("d/other", strings.Repeat("other ", 50000))
		b.Text("d/empty", "")
		b.Symlink("d/link", "file")
		b.Node(tar.TypeFifo, "fifo", 0o600, 0, 0)
		b.Node(tar.TypeChar, "null", 0o666, 1, 3)
		b.File("capable", 0o755, []byte("#!\n"), testkit.Xattr("security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
		b.Text("gone", "whited out above\n")
		b.Dir("hidden", 0o755)
		b.Text("hidden/old", "behind an opaque directory\n")
		b.Text("implied/by/file", "nothing lists its directories\n")
	})
	must(t, err)
	top, err := l.AddLayer(testkit.Zstd, "top", func(b *testkit.LayerBuilder) {
		b.Whiteout("gone")
		b.Dir("hidden", 0o755)
		b.Opaque("hidden")
		b.Text("hidden/new", "in front\n", testkit.MTime(time.Unix(1_700_000_000, 123_456_789)))
		b.Dir("d", 0o750, testkit.Owner(7, 8))
	})
	must(t, err)
	m, err := l.AddImage(ocispec.ImageConfig{}, base, top)
	must(t, err)
	img, err := l.Finish("all:1", m)
	must(t, err)
	return img
}

// treeCase is one damage of a file of one layer.
type treeCase struct {
	name   string
	layer  int
	damage func(at func(string) string) error
	want   []finding // at: in the layer's tree
}

func one(kind foreign.Kind, at string) []finding { return []finding{{kind, layout.Damage, at}} }

// quietly changes a name and keeps its directory's time.
func quietly(name string, change func(string) error) error {
	return keepDirTime(name, func() error { return change(name) })
}

func remake(name string, mode uint32, dev uint64) error {
	return quietly(name, func(name string) error { return errors.Join(os.Remove(name), unix.Mknod(name, mode, int(dev))) })
}

var treeCases = []treeCase{
	{"emptied", 0, func(at func(string) string) error {
		return keepTime(at("d/other"), func() error { return truncate(at("d/other")) })
	}, one(foreign.Empty, "/d/other")},
	{"cut short", 0, func(at func(string) string) error { return shorten(at("d/other")) }, one(foreign.Short, "/d/other")},
	{"longer", 0, func(at func(string) string) error { return lengthen(at("d/other")) }, one(foreign.Long, "/d/other")},
	{"longer than nothing", 0, func(at func(string) string) error { return lengthen(at("d/empty")) }, one(foreign.Long, "/d/empty")},
	{"flipped", 0, func(at func(string) string) error { return flip(at("d/other")) }, one(foreign.Altered, "/d/other")},
	{"emptied under two names", 0, func(at func(string) string) error {
		return keepTime(at("hard"), func() error { return truncate(at("hard")) })
	}, []finding{{foreign.Empty, layout.Damage, "/d/file"}, {foreign.Empty, layout.Damage, "/hard"}}},
	{"removed", 0, func(at func(string) string) error { return quietly(at("d/other"), os.Remove) }, one(foreign.Missing, "/d/other")},
	{"empty file removed", 0, func(at func(string) string) error { return quietly(at("d/empty"), os.Remove) }, one(foreign.Missing, "/d/empty")},
	{"one of two names removed", 0, func(at func(string) string) error { return quietly(at("hard"), os.Remove) }, one(foreign.Missing, "/hard")},
	{"directory removed", 0, func(at func(string) string) error { return quietly(at("d"), os.RemoveAll) }, []finding{
		{foreign.Missing, layout.Damage, "/d"}, {foreign.Missing, layout.Damage, "/d/file"}, {foreign.Missing, layout.Damage, "/d/other"},
		{foreign.Missing, layout.Damage, "/d/empty"}, {foreign.Missing, layout.Damage, "/d/link"},
	}},
	{"below an implied directory removed", 0, func(at func(string) string) error { return os.RemoveAll(at("implied")) }, one(foreign.Missing, "/implied/by/file")},
	{"extra file", 0, func(at func(string) string) error {
		return quietly(at("d/extra"), func(name string) error { return os.WriteFile(name, []byte("x"), 0o600) })
	}, one(foreign.Extra, "/d/extra")},
	{"extra directory", 0, func(at func(string) string) error {
		return errors.Join(os.Mkdir(at("extra"), 0o755), os.WriteFile(at("extra/in"), nil, 0o600))
	}, one(foreign.Extra, "/extra")},
	{"mode", 0, func(at func(string) string) error { return os.Chmod(at("d/file"), 0o644) }, []finding{{foreign.Mode, layout.Damage, "/d/file"}, {foreign.Mode, layout.Damage, "/hard"}}},
	{"setuid", 0, func(at func(string) string) error { return syscall.Chmod(at("d/other"), 0o4644) }, one(foreign.Mode, "/d/other")},
	{"mode of a directory", 0, func(at func(string) string) error { return os.Chmod(at("d"), 0o755) }, one(foreign.Mode, "/d")},
	{"owner", 0, func(at func(string) string) error { return os.Lchown(at("d/link"), 1, 0) }, one(foreign.Owner, "/d/link")},
	{"group", 0, func(at func(string) string) error { return os.Lchown(at("d/file"), 7, 9) }, []finding{{foreign.Owner, layout.Damage, "/d/file"}, {foreign.Owner, layout.Damage, "/hard"}}},
	{"time", 0, func(at func(string) string) error { return os.Chtimes(at("d/file"), time.Time{}, time.Unix(1, 0)) }, []finding{{foreign.Time, layout.Damage, "/d/file"}, {foreign.Time, layout.Damage, "/hard"}}},
	{"time of a directory", 0, func(at func(string) string) error { return os.Chtimes(at("d"), time.Time{}, time.Unix(1, 0)) }, one(foreign.Time, "/d")},
	{"a nanosecond", 1, func(at func(string) string) error {
		return os.Chtimes(at("hidden/new"), time.Time{}, time.Unix(1_700_000_000, 123_456_790))
	}, one(foreign.Time, "/hidden/new")},
	{"xattr changed", 0, func(at func(string) string) error {
		return unix.Setxattr(at("d/file"), "user.colour", []byte("blue"), 0)
	}, []finding{{foreign.Xattr, layout.Damage, "/d/file"}, {foreign.Xattr, layout.Damage, "/hard"}}},
	{"xattr removed", 0, func(at func(string) string) error { return unix.Removexattr(at("d/file"), "user.colour") }, []finding{{foreign.Xattr, layout.Damage, "/d/file"}, {foreign.Xattr, layout.Damage, "/hard"}}},
	{"xattr added", 0, func(at func(string) string) error { return unix.Setxattr(at("d/other"), "user.new", []byte("1"), 0) }, []finding{{foreign.Xattr, layout.Notice, "/d/other"}}},
	{"capability removed", 0, func(at func(string) string) error { return unix.Removexattr(at("capable"), "security.capability") }, one(foreign.Xattr, "/capable")},
	{"capability added", 0, func(at func(string) string) error {
		return unix.Setxattr(at("d/other"), "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0)
	}, one(foreign.Xattr, "/d/other")},
	{"link target", 0, func(at func(string) string) error {
		return quietly(at("d/link"), func(name string) error {
			then := []unix.Timespec{{Sec: testkit.Epoch.Unix()}, {Sec: testkit.Epoch.Unix()}}
			return errors.Join(os.Remove(name), os.Symlink("elsewhere", name), unix.UtimesNanoAt(unix.AT_FDCWD, name, then, unix.AT_SYMLINK_NOFOLLOW))
		})
	}, one(foreign.Target, "/d/link")},
	{"device number", 0, func(at func(string) string) error {
		return errors.Join(remake(at("null"), unix.S_IFCHR|0o666, unix.Mkdev(1, 5)), os.Chmod(at("null"), 0o666), os.Chtimes(at("null"), time.Time{}, testkit.Epoch))
	}, one(foreign.Device, "/null")},
	{"a fifo where a file was", 0, func(at func(string) string) error { return remake(at("d/other"), unix.S_IFIFO|0o644, 0) }, one(foreign.Type, "/d/other")},
	{"a link where a directory was", 0, func(at func(string) string) error {
		return errors.Join(os.Rename(at("implied/by"), at("implied/moved")), os.Symlink("moved", at("implied/by")))
	}, []finding{{foreign.Type, layout.Damage, "/implied/by"}, {foreign.Missing, layout.Damage, "/implied/by/file"}, {foreign.Extra, layout.Damage, "/implied/moved"}}},
	{"a hard link no more", 0, func(at func(string) string) error {
		data, err := os.ReadFile(at("hard"))
		return errors.Join(err, os.Remove(at("hard")), os.WriteFile(at("hard"), data, 0o640), os.Chmod(at("hard"), 0o640), os.Chown(at("hard"), 7, 8),
			unix.Setxattr(at("hard"), "user.colour", []byte("grey"), 0), os.Chtimes(at("hard"), time.Time{}, testkit.Epoch))
	}, one(foreign.Link, "/hard")},
	{"a hard link too many", 0, func(at func(string) string) error {
		// One inode for two files that differ in their contents alone.
		return quietly(at("d/empty"), func(name string) error { return errors.Join(os.Remove(name), os.Link(at("d/other"), name)) })
	}, []finding{{foreign.Link, layout.Damage, ""}, {foreign.Long, layout.Damage, "/d/empty"}}},
	{"whiteout removed", 1, func(at func(string) string) error { return os.Remove(at("gone")) }, one(foreign.Missing, "/gone")},
	{"whiteout of something", 1, func(at func(string) string) error {
		return quietly(at("d/file"), func(name string) error { return unix.Mknod(name, unix.S_IFCHR, 0) })
	}, one(foreign.Extra, "/d/file")},
	{"whiteout of nothing", 1, func(at func(string) string) error { return unix.Mknod(at("never"), unix.S_IFCHR, 0) }, nil},
	{"whiteout a file", 1, func(at func(string) string) error { return remake(at("gone"), unix.S_IFREG|0o644, 0) }, one(foreign.Type, "/gone")},
	{"opaque no more", 1, func(at func(string) string) error { return unix.Removexattr(at("hidden"), "trusted.overlay.opaque") }, one(foreign.Xattr, "/hidden")},
	{"opaque and was not", 1, func(at func(string) string) error {
		return unix.Setxattr(at("d"), "trusted.overlay.opaque", []byte("y"), 0)
	}, one(foreign.Xattr, "/d")},
	{"a socket", 0, func(at func(string) string) error { return unix.Mknod(at("socket"), unix.S_IFSOCK|0o600, 0) }, nil},
	{"redirected", 0, func(at func(string) string) error {
		return errors.Join(quietly(at("d/other"), os.Remove), unix.Setxattr(at("d"), "trusted.overlay.redirect", []byte("/x"), 0))
	}, []finding{{foreign.Unchecked, layout.Notice, "/d"}}},
	{"a copy of attributes", 0, func(at func(string) string) error {
		return errors.Join(flip(at("d/other")), unix.Setxattr(at("d/other"), "trusted.overlay.metacopy", nil, 0))
	}, []finding{{foreign.Unchecked, layout.Notice, "/d/other"}}},
	{"a mark of overlayfs", 1, func(at func(string) string) error {
		return unix.Setxattr(at("d"), "trusted.overlay.impure", []byte("y"), 0)
	}, nil},
}

// testTrees does every damage to a copy of a store.
func testTrees(t *testing.T, engine foreign.Engine, made string, tree func(layer int) string) {
	for _, c := range treeCases {
		t.Run(c.name, func(t *testing.T) {
			root := copyOf(t, made)
			at := filepath.Join(root, strings.TrimPrefix(tree(c.layer), made))
			must(t, c.damage(func(name string) string { return filepath.Join(at, name) }))
			before := listed(t, root)
			report := check(t, engine, root)
			wantFindings(t, report, c.want...)
			wantUntouched(t, root, before)
			for _, f := range report.Findings {
				if f.File == "" || !strings.HasSuffix(f.Path, f.File) || len(f.Images) != 1 || !exists(filepath.Join(root, filepath.Dir(f.Path))) && f.Kind != foreign.Missing {
					t.Errorf("%+v", f)
				}
			}
		})
	}
}

func TestDamagedDockerTrees(t *testing.T) {
	r := makeDocker(t, bitOfAll(t))
	testTrees(t, foreign.Docker, r.dir, r.tree)
}

func TestDamagedContainerdTrees(t *testing.T) {
	r := makeContainerd(t, bitOfAll(t))
	testTrees(t, foreign.Containerd, r.dir, func(layer int) string { return r.tree(t, layer) })
}

// awkwardParts are what the engines' own unpackers take of the awkward image.
// Of a sparse file dockerd's record does not give the stream again.
func awkwardParts(t *testing.T, engine foreign.Engine) testkit.Image {
	t.Helper()
	if engine == foreign.Docker {
		return testkit.AwkwardWithout(t, testkit.Gzip, "hardlinks into lower layers", "implied directories", "duplicates", "sparse")
	}
	return testkit.AwkwardWithout(t, "", "hardlinks into lower layers", "implied directories")
}

func TestCleanStores(t *testing.T) {
	for _, img := range []testkit.Image{bitOfAll(t), awkwardParts(t, foreign.Docker)} {
		r := makeDocker(t, img)
		before := listed(t, r.dir)
		report := check(t, foreign.Docker, r.dir)
		wantClean(t, report)
		wantUntouched(t, r.dir, before)
		if report.Layers != len(r.chains) || report.Images != 1 || report.Files == 0 {
			t.Errorf("%+v", report)
		}
	}
	for _, img := range []testkit.Image{bitOfAll(t), awkwardParts(t, foreign.Containerd)} {
		r := makeContainerd(t, img)
		before := listed(t, r.dir)
		report := check(t, foreign.Containerd, r.dir)
		wantClean(t, report)
		wantUntouched(t, r.dir, before)
		if report.Layers != len(r.chains) || report.Images != 1 || report.Blobs != len(r.chains)+2 || report.Files == 0 {
			t.Errorf("%+v", report)
		}
	}
}
