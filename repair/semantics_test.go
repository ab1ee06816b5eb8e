package repair_test

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"varve.dev/internal/testkit"
	"varve.dev/overlay"
)

// These tests hold the kernel to what docs/design/0006 builds on: how a mounted
// overlay sees that a file of a layer below it was replaced. No documentation
// promises it, so a kernel that does it differently has to be noticed.

const (
	page      = 4096
	handleFID = 0x200 // AT_HANDLE_FID, Linux 6.6 for overlays
)

var bad, good = bytes.Repeat([]byte("bad_"), 3*page/4), bytes.Repeat([]byte("good"), 3*page/4)

// stack is a layer with the bad files d/f and d/g, below an upper directory;
// their good ones stand aside.
type stack struct {
	t                         *testing.T
	dir, low, aside, seen, up string
	disk                      testkit.Disk
	mounted                   overlay.Tree
}

func onEach(t *testing.T, f func(t *testing.T, s *stack)) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) { f(t, newStack(t, kind)) })
	}
}

func newStack(t *testing.T, kind string) *stack {
	disk := testkit.NewDisk(t, kind, 320)
	dir := disk.Dir
	s := &stack{t: t, dir: dir, disk: disk, low: dir + "/low/d", aside: dir + "/aside", seen: dir + "/seen/d", up: dir + "/up/d"}
	for _, d := range []string{"low/d", "bottom", "aside", "up", "work", "seen"} {
		must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	for _, name := range []string{"/f", "/g"} {
		must(t, os.WriteFile(s.low+name, bad, 0o644))
		must(t, os.WriteFile(s.aside+name, good, 0o644))
	}
	// Two layers: one alone would be a bind mount.
	s.mounted = overlay.Tree{Lowers: []string{dir + "/low", dir + "/bottom"}, Upper: dir + "/up", Work: dir + "/work"}
	return s
}

func (s *stack) mount() {
	must(s.t, overlay.Mount(s.mounted, s.dir+"/seen"))
	s.t.Cleanup(func() { must(s.t, unix.Unmount(s.dir+"/seen", 0)) })
}

func (s *stack) exchange() {
	s.t.Helper()
	must(s.t, unix.Renameat2(unix.AT_FDCWD, s.aside+"/f", unix.AT_FDCWD, s.low+"/f", unix.RENAME_EXCHANGE))
}

func (s *stack) wants(what string, want []byte) {
	s.t.Helper()
	if got, err := os.ReadFile(s.seen + "/f"); err != nil || !bytes.Equal(got, want) {
		s.t.Errorf("%s: %.4q (%v), want %.4q", what, got, err, want)
	}
}

// letGo reconfigures the overlay at path with nothing changed: every name that
// nobody holds is looked up anew.
func letGo(t *testing.T, path string) {
	t.Helper()
	fd, err := unix.Fspick(unix.AT_FDCWD, path, unix.FSPICK_CLOEXEC)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.FsconfigReconfigure(fd))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// What nobody looked at is new. A name that was looked up stays old until it
// is let go, which it cannot be while a descriptor or mapping is held.
func TestExchangedFile(t *testing.T) {
	onEach(t, func(t *testing.T, s *stack) {
		s.mount()
		s.wants("before", bad)
		s.exchange()
		s.wants("a cached name", bad)
		letGo(t, s.dir+"/seen")
		s.wants("let go", good)
		held, err := os.Open(s.seen + "/f")
		must(t, err)
		m, err := unix.Mmap(int(held.Fd()), 0, len(good), unix.PROT_READ, unix.MAP_PRIVATE)
		must(t, err)
		s.exchange()
		letGo(t, s.dir+"/seen")
		s.wants("held", good)
		buf := make([]byte, len(good))
		if _, err := held.ReadAt(buf, 0); err != nil || !bytes.Equal(buf, good) || !bytes.Equal(m, good) {
			t.Errorf("a descriptor or mapping that was held changed (%v)", err)
		}
		must(t, errors.Join(held.Close(), unix.Munmap(m)))
		letGo(t, s.dir+"/seen")
		s.wants("no longer held", bad)
	})
}

// The same goes for a file that was missing and for a whiteout that was a file.
func TestNames(t *testing.T) {
	onEach(t, func(t *testing.T, s *stack) {
		must(t, os.WriteFile(s.dir+"/bottom/w", bad, 0o644))
		must(t, os.WriteFile(s.dir+"/low/w", nil, 0o644))
		s.mount()
		there := func(name string, want bool) {
			t.Helper()
			if _, err := os.Stat(s.dir + "/seen" + name); (err == nil) != want || err != nil && !errors.Is(err, unix.ENOENT) {
				t.Errorf("%s: %v", name, err)
			}
		}
		there("/d/missing", false)
		there("/w", true)
		must(t, os.Rename(s.aside+"/f", s.low+"/missing"))
		must(t, unix.Mknod(s.aside+"/w", unix.S_IFCHR, 0))
		must(t, unix.Renameat2(unix.AT_FDCWD, s.aside+"/w", unix.AT_FDCWD, s.dir+"/low/w", unix.RENAME_EXCHANGE))
		there("/d/missing", false)
		there("/w", true)
		letGo(t, s.dir+"/seen")
		there("/d/missing", true)
		there("/w", false)
	})
}

// A container that writes to a file that it had looked up copies the bad bytes.
// The copy says from which inode, unless that has no name any more.
func TestCopyUp(t *testing.T) {
	onEach(t, func(t *testing.T, s *stack) {
		s.mount()
		was := handle(t, s.low+"/f", 0)
		for _, name := range []string{"/f", "/g"} {
			_, err := os.Stat(s.seen + name)
			must(t, err)
		}
		s.exchange()
		must(t, os.Rename(s.aside+"/g", s.low+"/g")) // the bad one is unlinked
		origin := make([]byte, 256)
		for _, name := range []string{"/f", "/g"} {
			must(t, os.Chown(s.seen+name, 7, 7))
			if got, err := os.ReadFile(s.up + name); err != nil || !bytes.Equal(got, bad) {
				t.Errorf("%s: the copy is %.4q (%v)", name, got, err)
			}
		}
		if n, err := unix.Getxattr(s.up+"/f", "trusted.overlay.origin", origin); err != nil || !bytes.HasSuffix(origin[:n], was) {
			t.Errorf("exchanged: origin %x (%v) does not end in %x", origin[:max(n, 0)], err, was)
		}
		if _, err := unix.Getxattr(s.up+"/g", "trusted.overlay.origin", origin); !errors.Is(err, unix.ENODATA) {
			t.Errorf("unlinked: origin %x (%v)", origin, err)
		}
	})
}

// Who holds a file: the overlay's handle ends in that of the inode below,
// whatever became of its name, and that inode gives no lease.
func TestHolders(t *testing.T) {
	onEach(t, func(t *testing.T, s *stack) {
		s.mount()
		held, err := os.Open(s.seen + "/f")
		must(t, err)
		m, err := unix.Mmap(int(held.Fd()), 0, page, unix.PROT_READ, unix.MAP_PRIVATE)
		must(t, err)
		s.exchange()
		maps := fmt.Sprintf("/proc/self/map_files/%x-%x", &m[0], uintptr(unsafe.Pointer(&m[0]))+page)
		for _, path := range []string{fmt.Sprintf("/proc/self/fd/%d", held.Fd()), strings.Replace(maps, "0x", "", 1)} {
			if got, want := handle(t, path, unix.AT_SYMLINK_FOLLOW|handleFID), handle(t, s.aside+"/f", 0); !bytes.HasSuffix(got, want) {
				t.Errorf("%s: handle %x does not end in %x", path, got, want)
			}
		}
		must(t, held.Close())
		if err := lease(t, s.aside+"/f"); !errors.Is(err, unix.EAGAIN) {
			t.Errorf("lease on a mapped file: %v", err)
		}
		must(t, lease(t, s.low+"/f"))
		must(t, unix.Munmap(m))
		must(t, lease(t, s.aside+"/f"))
	})
}

func handle(t *testing.T, path string, flags int) []byte {
	t.Helper()
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, path, flags)
	must(t, err)
	return h.Bytes()
}

func lease(t *testing.T, path string) error {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close() // gives the lease back
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	return err
}

// A mode that is set right in place is shown at once, and counts when the name
// is let go.
func TestAttributes(t *testing.T) {
	onEach(t, func(t *testing.T, s *stack) {
		s.mount()
		root, err := os.Open(s.dir + "/seen")
		must(t, err)
		defer root.Close()
		must(t, nobodyOpens(root, "d/f"))
		must(t, os.Chmod(s.low+"/f", 0o600))
		fi, err := os.Stat(s.seen + "/f")
		must(t, err)
		if err := nobodyOpens(root, "d/f"); fi.Mode() != 0o600 || err != nil {
			t.Errorf("shown %v, opening says %v", fi.Mode(), err)
		}
		letGo(t, s.dir+"/seen")
		if err := nobodyOpens(root, "d/f"); !errors.Is(err, unix.EACCES) {
			t.Errorf("let go: %v", err)
		}
	})
}

func nobodyOpens(root *os.File, name string) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setfsuid(65534); err != nil {
		return err
	}
	fd, err := unix.Openat(int(root.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return errors.Join(err, unix.Setfsuid(0))
}

// A container's overlay can be let go from outside its mount namespace.
func TestOtherNamespace(t *testing.T) {
	onEach(t, func(t *testing.T, s *stack) {
		c := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-c", "mount -t overlay o -o "+strings.Join(overlay.Options(), ",")+
			",lowerdir="+strings.Join(s.mounted.Lowers, ":")+",upperdir="+s.mounted.Upper+",workdir="+s.mounted.Work+" "+
			s.dir+"/seen && cd "+s.dir+"/seen && echo ready && exec sleep 60")
		out, err := c.StdoutPipe()
		must(t, err)
		must(t, c.Start())
		defer func() { c.Process.Kill(); c.Wait() }()
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
			t.Fatalf("%q (%v)", line, err)
		}
		s.seen = fmt.Sprintf("/proc/%d/cwd/d", c.Process.Pid)
		s.wants("before", bad)
		s.exchange()
		s.wants("a cached name", bad)
		letGo(t, filepath.Dir(s.seen))
		s.wants("let go", good)
	})
}

// The page cache hides damage on the disk from all but O_DIRECT, and while the
// page is mapped, FADV_DONTNEED does not take it out.
func TestDamageBehindThePageCache(t *testing.T) {
	onEach(t, func(t *testing.T, s *stack) {
		unique := make([]byte, 3*page)
		rand.Read(unique)
		must(t, os.WriteFile(s.low+"/f", unique, 0o644))
		unix.Sync()
		s.mount()
		f, err := os.Open(s.seen + "/f")
		must(t, err)
		defer f.Close()
		m, err := unix.Mmap(int(f.Fd()), 0, len(unique), unix.PROT_READ, unix.MAP_PRIVATE)
		must(t, err)
		defer unix.Munmap(m)
		if !bytes.Equal(m, unique) { // which maps every page, too
			t.Error("the mapping is not the file")
		}
		s.disk.Change(t, unique[page:], []byte("damaged"))
		must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		s.wants("through the page cache", unique)
		fd, err := unix.Open(s.low+"/f", unix.O_RDONLY|unix.O_DIRECT, 0)
		must(t, err)
		defer unix.Close(fd)
		buf, err := unix.Mmap(-1, 0, len(unique), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		must(t, err)
		defer unix.Munmap(buf)
		copy(buf, bad) // btrfs reads the page cache all the same into pages that are not there yet
		if n, err := unix.Pread(fd, buf, 0); err == nil && bytes.Equal(buf[:n], unique) {
			t.Error("O_DIRECT does not see what is on the disk")
		}
	})
}
