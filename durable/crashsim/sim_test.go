package crashsim_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/durable/crashsim"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_ROOT") == "1" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

func attach(t *testing.T) (*durable.Root, *crashsim.Sim) {
	t.Helper()
	needRoot(t)
	root, err := durable.Create(filepath.Join(t.TempDir(), "root"), 0o711)
	if err != nil {
		t.Fatal(err)
	}
	sim, err := crashsim.Attach(root, crashsim.Database{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sim.Err(); err != nil {
			t.Error(err)
		}
		sim.Detach()
		root.Close()
	})
	return root, sim
}

// image returns the directory of a fresh image.
func image(t *testing.T, sim *crashsim.Sim, mode crashsim.Mode, seed uint64) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "image")
	if err := sim.Image(dir, mode, seed); err != nil {
		t.Fatal(err)
	}
	return dir
}

// list describes everything below dir: names, and the contents of files.
func list(t *testing.T, dir string) string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		if d.Type().IsRegular() {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			rel += "=" + string(data)
		} else if d.IsDir() {
			rel += "/"
		}
		out = append(out, rel)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, " ")
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, root *durable.Root, name, data string, sync bool) {
	t.Helper()
	f, err := root.CreateFile(name, 0o644)
	must(t, err)
	_, err = f.Write([]byte(data))
	must(t, err)
	if sync {
		must(t, f.Sync())
	}
	must(t, f.Close())
}

// What is durable after each sequence, and what is there at most.
func TestWhatSurvives(t *testing.T) {
	for _, c := range []struct {
		name      string
		do        func(*testing.T, *durable.Root)
		none, all string
	}{
		{"a file without any sync is gone", func(t *testing.T, r *durable.Root) {
			write(t, r, "f", "data", false)
		}, "", "f=data"},
		{"a file whose name is synced and contents are not is empty", func(t *testing.T, r *durable.Root) {
			write(t, r, "f", "data", false)
			must(t, r.SyncDirs("."))
		}, "f=", "f=data"},
		{"a synced file without its name is gone", func(t *testing.T, r *durable.Root) {
			write(t, r, "f", "data", true)
		}, "", "f=data"},
		{"contents and name synced", func(t *testing.T, r *durable.Root) {
			write(t, r, "f", "data", true)
			must(t, r.SyncDirs("."))
		}, "f=data", "f=data"},
		{"a rename without a sync is undone", func(t *testing.T, r *durable.Root) {
			write(t, r, "f", "data", true)
			must(t, r.SyncDirs("."))
			must(t, r.Rename("f", "g"))
		}, "f=data", "g=data"},
		{"a rename, only the new directory synced: two names", func(t *testing.T, r *durable.Root) {
			must(t, r.MkdirAll("a", 0o755))
			must(t, r.MkdirAll("b", 0o755))
			write(t, r, "a/f", "data", true)
			must(t, r.SyncDirs("a"))
			must(t, r.Rename("a/f", "b/f"))
			must(t, r.SyncDirs("b"))
		}, "a/ a/f=data b/ b/f=data", "a/ b/ b/f=data"},
		{"a rename, only the old directory synced: lost", func(t *testing.T, r *durable.Root) {
			must(t, r.MkdirAll("a", 0o755))
			must(t, r.MkdirAll("b", 0o755))
			write(t, r, "a/f", "data", true)
			must(t, r.SyncDirs("a"))
			must(t, r.Rename("a/f", "b/f"))
			must(t, r.SyncDirs("a"))
		}, "a/ b/", "a/ b/ b/f=data"},
		{"a directory has one place", func(t *testing.T, r *durable.Root) {
			must(t, r.MkdirAll("a/d", 0o755))
			must(t, r.MkdirAll("b", 0o755))
			must(t, r.MkdirAll("c", 0o755))
			must(t, r.Rename("a/d", "b/d"))
			must(t, r.Rename("b/d", "c/d"))
			must(t, r.SyncDirs("c"))
		}, "a/ b/ c/ c/d/", "a/ b/ c/ c/d/"},
		{"a publication is complete", func(t *testing.T, r *durable.Root) {
			must(t, r.MkdirAll("a", 0o755))
			must(t, r.MkdirAll("b", 0o755))
			write(t, r, "a/f", "data", true)
			must(t, r.Publish("a/f", "b/f"))
		}, "a/ b/ b/f=data", "a/ b/ b/f=data"},
		{"a removal without a sync is undone", func(t *testing.T, r *durable.Root) {
			must(t, r.MkdirAll("a", 0o755))
			write(t, r, "a/f", "data", true)
			must(t, r.SyncDirs("a"))
			must(t, r.RemoveAll("a"))
		}, "a/ a/f=data", ""},
		{"a file written again keeps its old contents", func(t *testing.T, r *durable.Root) {
			must(t, r.WriteFile("f", []byte("old"), 0o644))
			f, err := r.AppendFile("f", 0)
			must(t, err)
			must(t, f.Truncate(0))
			_, err = f.Write([]byte("new and longer"))
			must(t, err)
			must(t, f.Close())
		}, "f=old", "f=new and longer"},
		{"a barrier covers a tree and the way to it", func(t *testing.T, r *durable.Root) {
			must(t, r.Mkdir("s", 0o755))
			must(t, r.Mkdir("s/t", 0o755))
			b := r.NewBarrier()
			tree, err := r.NewTree("s/t", b)
			must(t, err)
			_, _, err = tree.File("x/f", durable.Attr{Mode: 0o600}, strings.NewReader("data"), false, make([]byte, 16))
			must(t, err)
			must(t, tree.Close())
			write(t, r, "s/other", "", false)
			must(t, b.Wait("s/t"))
		}, "s/ s/t/ s/t/x/ s/t/x/f=data", "s/ s/other= s/t/ s/t/x/ s/t/x/f=data"},
		{"names synced by one flush", func(t *testing.T, r *durable.Root) {
			must(t, r.MkdirAll("a", 0o755))
			must(t, r.MkdirAll("b", 0o755))
			write(t, r, "a/f", "data", true)
			must(t, r.Rename("a/f", "b/f"))
			must(t, r.SyncNames("a", "b"))
		}, "a/ b/ b/f=data", "a/ b/ b/f=data"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, sim := attach(t)
			c.do(t, root)
			if got := list(t, image(t, sim, crashsim.None, 0)); got != c.none {
				t.Errorf("none: %q, want %q", got, c.none)
			}
			if got := list(t, image(t, sim, crashsim.All, 0)); got != c.all {
				t.Errorf("all: %q, want %q", got, c.all)
			}
		})
	}
}

// A rename that no directory sync followed shows the old name or the new one,
// each with some seed, and never both or neither.
func TestRenameIsAtomic(t *testing.T) {
	root, sim := attach(t)
	must(t, root.MkdirAll("a", 0o755))
	must(t, root.MkdirAll("b", 0o755))
	write(t, root, "a/f", "data", true)
	must(t, root.SyncDirs("a"))
	must(t, root.Rename("a/f", "b/f"))
	seen := map[string]int{}
	for seed := range uint64(40) {
		seen[list(t, image(t, sim, crashsim.Some, seed))]++
	}
	if len(seen) != 2 || seen["a/ a/f=data b/"] == 0 || seen["a/ b/ b/f=data"] == 0 {
		t.Errorf("states seen: %v", seen)
	}
}

// Unsynced contents arrive block by block, with holes, and in either length.
func TestTornContents(t *testing.T) {
	root, sim := attach(t)
	const blocks = 8
	must(t, root.WriteFile("f", bytes.Repeat([]byte{'o'}, 4096*2), 0o644))
	f, err := root.AppendFile("f", 0)
	must(t, err)
	must(t, f.Truncate(0))
	_, err = f.Write(bytes.Repeat([]byte{'n'}, 4096*blocks))
	must(t, err)
	must(t, f.Close())
	var long, short, hole, torn int
	for seed := range uint64(60) {
		data, err := os.ReadFile(filepath.Join(image(t, sim, crashsim.Some, seed), "f"))
		must(t, err)
		switch len(data) {
		case 4096 * 2:
			short++
		case 4096 * blocks:
			long++
		default:
			t.Fatalf("length %d is neither the old nor the new", len(data))
		}
		var kinds [256]int
		for off := 0; off < len(data); off += 4096 {
			block := data[off : off+4096]
			if !bytes.Equal(block, bytes.Repeat(block[:1], 4096)) {
				t.Fatal("a block is torn within")
			}
			kinds[block[0]]++
		}
		if kinds[0] > 0 {
			hole++
		}
		if kinds['o'] > 0 && kinds['n'] > 0 {
			torn++
		}
	}
	if long == 0 || short == 0 || hole == 0 || torn == 0 {
		t.Errorf("of 60 images %d long, %d short, %d with holes, %d torn", long, short, hole, torn)
	}
}

// Everything that a layer's tree can have is in an image as it was.
func TestAttributesAndSpecialFiles(t *testing.T) {
	root, sim := attach(t)
	must(t, root.Mkdir("t", 0o755))
	b := root.NewBarrier()
	tree, err := root.NewTree("t", b)
	must(t, err)
	const mtime = 1_600_000_000_123_456_789
	a := func(mode uint32, xattrs map[string]string) durable.Attr {
		return durable.Attr{Mode: mode, UID: 7, GID: 8, MTime: mtime, Xattrs: xattrs}
	}
	must(t, tree.Mkdir("d", a(0o1777, map[string]string{"trusted.overlay.opaque": "y"})))
	_, _, err = tree.File("d/f", a(0o4755, map[string]string{"user.x": "1", "trusted.t": "\x00\x01"}), strings.NewReader("abc"), false, make([]byte, 8))
	must(t, err)
	must(t, tree.Link("hard", "d/f"))
	must(t, tree.Symlink("sym", "../../nowhere", a(0o777, nil)))
	must(t, tree.Node("white", unix.S_IFCHR, 0, a(0o600, nil)))
	must(t, tree.Node("dev", unix.S_IFBLK, unix.Mkdev(8, 1), a(0o640, nil)))
	must(t, tree.Node("fifo", unix.S_IFIFO, 0, a(0o644, nil)))
	must(t, tree.SetTime("d", mtime))
	must(t, tree.Close())
	must(t, b.Wait("t"))

	want, got := describe(t, root.Path("t")), describe(t, filepath.Join(image(t, sim, crashsim.None, 0), "t"))
	if got != want {
		t.Errorf("image:\n%s\nlive:\n%s", got, want)
	}
	if !strings.Contains(want, "trusted.overlay.opaque=y") || strings.Count(want, "nlink=2 ") < 2 {
		t.Errorf("the live tree is not what was to be tested:\n%s", want)
	}
}

func describe(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	must(t, filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		must(t, unix.Lstat(p, &st))
		rel, _ := filepath.Rel(dir, p)
		nlink := uint64(st.Nlink)
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			nlink = 0
		}
		mtime := st.Mtim
		if rel == "." {
			mtime = unix.Timespec{} // of the tree's own directory nobody took care
		}
		fmt.Fprintf(&out, "%s %o %d:%d rdev=%d size=%d nlink=%d %v", rel, st.Mode, st.Uid, st.Gid, st.Rdev, st.Size*int64(min(nlink, 1)), nlink, mtime)
		names := make([]byte, 4096)
		n, err := unix.Llistxattr(p, names)
		must(t, err)
		list := strings.Split(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00")
		slices.Sort(list)
		for _, name := range list {
			value := make([]byte, 4096)
			if m, err := unix.Lgetxattr(p, name, value); err == nil {
				fmt.Fprintf(&out, " %s=%s", name, value[:m])
			}
		}
		out.WriteByte('\n')
		return nil
	}))
	return out.String()
}

// What stood there before, what was written past package durable, and the
// database.
func TestAdoptionAndDatabase(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "root")
	root, err := durable.Create(dir, 0o711)
	must(t, err)
	defer root.Close()
	must(t, root.MkdirAll("active/x", 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "before"), []byte("b"), 0o600))
	sim, err := crashsim.Attach(root, crashsim.Database{Name: "db", Copy: func(w io.Writer) error {
		_, err := io.WriteString(w, "committed")
		return err
	}})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, ".tmp-db"), []byte("raw"), 0o600))
	must(t, root.Publish(".tmp-db", "db"))
	must(t, os.WriteFile(filepath.Join(dir, "active/x/user"), []byte("u"), 0o600))
	if got, want := list(t, image(t, sim, crashsim.All, 0)), "active/ active/x/ before=b db=committed"; got != want {
		t.Errorf("before the barrier: %q, want %q", got, want)
	}
	must(t, root.NewBarrier().Wait("active/x"))
	must(t, sim.Err())
	if got, want := list(t, image(t, sim, crashsim.None, 0)), "active/ active/x/ active/x/user=u before=b db=committed"; got != want {
		t.Errorf("after the barrier: %q, want %q", got, want)
	}
}

// tinyWriter publishes numbered files and calls ack when one is safe. bug
// leaves one step out.
func tinyWriter(root *durable.Root, bug string, ack func(string)) error {
	for i := range 8 {
		tmp, name := fmt.Sprintf("tmp/%d", i), fmt.Sprintf("out/%d", i)
		f, err := root.CreateFile(tmp, 0o600)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(f, "contents of %d", i); err != nil {
			return err
		}
		if bug != "no file sync" {
			err = f.Sync()
		}
		if err != nil {
			return err
		}
		f.Close()
		if err := root.Rename(tmp, name); err != nil {
			return err
		}
		dirs := []string{"out", "tmp"}
		if bug == "no directory sync" {
			dirs = dirs[1:]
		}
		if err := root.SyncDirs(dirs...); err != nil {
			return err
		}
		ack(name)
	}
	return nil
}

// The purpose of it all: a writer with a sync left out is found, the right one
// is not blamed.
func TestPlantedBugsAreFound(t *testing.T) {
	for _, bug := range []string{"", "no file sync", "no directory sync"} {
		t.Run("bug="+bug, func(t *testing.T) {
			root, sim := attach(t)
			must(t, root.MkdirAll("tmp", 0o755))
			must(t, root.MkdirAll("out", 0o755))
			acked := map[string]bool{}
			var losses, n int
			scratch := t.TempDir()
			sim.Every(1, func(at crashsim.Moment) {
				for _, mode := range []crashsim.Mode{crashsim.None, crashsim.All, crashsim.Some} {
					n++
					dir := filepath.Join(scratch, fmt.Sprint(n))
					must(t, at.Image(dir, mode, uint64(n)))
					for name := range acked {
						data, err := os.ReadFile(filepath.Join(dir, name))
						if err != nil || string(data) != "contents of "+filepath.Base(name) {
							losses++
						}
					}
				}
			})
			must(t, tinyWriter(root, bug, func(name string) { acked[name] = true }))
			if sim.Images() != n || n < 8*5*3 {
				t.Errorf("%d images counted, %d made, want at least %d", sim.Images(), n, 8*5*3)
			}
			if (losses > 0) != (bug != "") {
				t.Errorf("%d losses seen in %d images", losses, n)
			}
			if sim.Missed() != 0 {
				t.Errorf("%d changes were not understood", sim.Missed())
			}
		})
	}
}
