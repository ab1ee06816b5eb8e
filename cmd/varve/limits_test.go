package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"varve.dev/internal/testkit"
)

// used returns the bytes and inodes in use on a disk.
func used(t *testing.T, dir string) (bytes, inodes uint64) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return (st.Blocks - st.Bfree) * uint64(st.Bsize), st.Files - st.Ffree
}

// A disk that is too small for an image, by its bytes or by its inodes: one
// clear error, everything that was taken is given back, and what fits goes on
// working.
func TestFullDisk(t *testing.T) {
	registry := testkit.Registry(t)
	small := registry.Push(t, testkit.Busybox(t), "small:1")
	many := registry.Push(t, testkit.Stacked(t, 20, 150), "large:1")
	heavy := registry.Push(t, testkit.Heavy(t, 8, 50), "large:2")
	const fillBytes = "dd if=/dev/zero of=/large/fill bs=1M"
	const fillInodes = "i=0; while touch /large/$i; do i=$((i+1)); done; touch /large/more"
	for _, c := range []struct {
		name         string
		mib          int
		options      []string
		large, fills string
	}{
		{"3,000 files on 32 MiB", 32, nil, many, fillBytes},
		{"3,000 files on 2,000 inodes", 64, []string{"-N", "2000"}, many, fillInodes},
		{"400 MiB on 256", 256, nil, heavy, fillBytes},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHostAt(t, filepath.Join(testkit.Ext4(t, c.mib, c.options...).Dir, "root"))
			h.run("pull", small)
			before, inodes := used(t, h.root)
			out, code := h.try("pull", c.large)
			if code == 0 || !strings.Contains(out, "no space left on device") || !strings.Contains(out, c.large) {
				t.Errorf("exit code %d, and the error does not say what and why:\n%s", code, out)
			}
			if n := strings.Count(out, "no space left"); n != 1 {
				t.Errorf("it says so %d times:\n%s", n, out)
			}
			after, inodesAfter := used(t, h.root)
			t.Logf("%d KiB and %d inodes before, %d and %d after", before>>10, inodes, after>>10, inodesAfter)
			if after > before+before/100 || inodesAfter > inodes+inodes/100 {
				t.Errorf("not given back: %d KiB and %d inodes", (after-before)>>10, inodesAfter-inodes)
			}
			out, code = h.try("build", "-t", "built", dockerfile(t, "FROM "+small+"\nRUN mkdir /large && { "+c.fills+"; }\n"))
			if code == 0 || !strings.Contains(out, "No space left") {
				t.Errorf("a step that fills the disk: exit code %d\n%s", code, out)
			}
			if out := h.run("run", "--rm", small, "echo", "still here"); out != "still here\n" {
				t.Errorf("run: %q", out)
			}
			// With nothing free, too.
			fill := filepath.Join(filepath.Dir(h.root), "fill")
			if err := os.Mkdir(fill, 0o700); err != nil {
				t.Fatal(err)
			}
			_ = exec.Command("sh", "-c", strings.ReplaceAll(c.fills, "/large", fill)).Run()
			h.run("rmi", small)
			if err := os.RemoveAll(fill); err != nil {
				t.Fatal(err)
			}
			h.run("pull", small)
		})
	}
}

// noOverlay has the test program replace itself by varve, after it has taken
// the overlay file system away from the process.
const noOverlay = "VARVE_TEST_NO_OVERLAY"

func init() {
	varve := os.Getenv(noOverlay)
	if varve == "" {
		return
	}
	os.Unsetenv(noOverlay)
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the system call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_FSOPEN, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENODEV)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	if errno == 0 {
		err := syscall.Exec(varve, append([]string{varve}, os.Args[1:]...), os.Environ())
		fmt.Fprintln(os.Stderr, "exec:", err)
	}
	os.Exit(99)
}

// Without overlayfs nothing runs, and the error says why; images can still be
// pulled and checked.
func TestNoOverlay(t *testing.T) {
	h := newHost(t)
	name := busybox(t)
	without := func(args ...string) (string, int) {
		cmd := exec.Command(os.Args[0], args...)
		cmd.Env = append(slices.Clone(h.env), noOverlay+"="+filepath.Join(h.bin, "varve"))
		out, _ := cmd.CombinedOutput()
		return string(out), cmd.ProcessState.ExitCode()
	}
	if out, code := without("pull", name); code != 0 {
		t.Errorf("pull: exit code %d\n%s", code, out)
	}
	for _, args := range [][]string{
		{"run", "--rm", name, "true"},
		{"build", dockerfile(t, "FROM "+name+"\nRUN true\n")},
		{"build", dockerfile(t, "FROM "+name+"\nCOPY a /a\n", "a", "data")},
	} {
		out, code := without(args...)
		if code == 0 || !strings.Contains(out, "no overlay file system") {
			t.Errorf("%v: exit code %d, and the error does not say why:\n%s", args, code, out)
		}
	}
	if out, code := without("fsck", "--deep"); code != 0 {
		t.Errorf("fsck: exit code %d\n%s", code, out)
	}
}
