package faultcall

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/internal/testkit"
)

// watched is set in the environment of the program that the tests watch: this
// one, in another process.
const watched = "FAULTCALL_TEST_DIR"

func TestMain(m *testing.M) {
	if err := Enter(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if dir := os.Getenv(watched); dir != "" {
		if err := work(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// steps are changes in all ways in which a file can be named, each with the
// call that it is.
var steps = []struct {
	call string
	do   func(dir string) error
}{
	{"mkdirat", func(dir string) error { return os.Mkdir(dir+"/d", 0o755) }},
	{"openat", func(dir string) error { return create(dir + "/d/f") }},
	{"write", func(dir string) error {
		return with(dir+"/d/f", func(f *os.File) error { _, err := f.WriteString("x"); return err })
	}},
	{"pwrite64", func(dir string) error {
		return with(dir+"/d/f", func(f *os.File) error { _, err := f.WriteAt([]byte("y"), 1); return err })
	}},
	{"ftruncate", func(dir string) error { return with(dir+"/d/f", func(f *os.File) error { return f.Truncate(1) }) }},
	{"sync_file_range", func(dir string) error {
		return with(dir+"/d/f", func(f *os.File) error { return unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE) })
	}},
	{"fsync", func(dir string) error { return with(dir+"/d/f", (*os.File).Sync) }},
	{"fdatasync", func(dir string) error {
		return with(dir+"/d/f", func(f *os.File) error { return unix.Fdatasync(int(f.Fd())) })
	}},
	{"openat2", func(dir string) error {
		return with(dir, func(d *os.File) error {
			fd, err := unix.Openat2(int(d.Fd()), "new", &unix.OpenHow{Flags: unix.O_CREAT | unix.O_WRONLY, Mode: 0o600})
			return errors.Join(err, unix.Close(fd))
		})
	}},
	{"lsetxattr", func(dir string) error {
		return with(dir, func(d *os.File) error {
			return unix.Lsetxattr(fmt.Sprintf("/proc/self/fd/%d/new", d.Fd()), "trusted.a", []byte("b"), 0)
		})
	}},
	{"symlinkat", func(dir string) error { return os.Symlink("/nowhere", dir+"/l") }},
	{"linkat", func(dir string) error { return os.Link(dir+"/new", dir+"/same") }},
	{"renameat", func(dir string) error { return os.Rename(dir+"/same", dir+"/other") }},
	{"fchmod", func(dir string) error { return with(dir+"/d/f", func(f *os.File) error { return f.Chmod(0o400) }) }},
	{"utimensat", func(dir string) error { return os.Chtimes(dir+"/d/f", time.Now(), time.Now()) }},
	// By a name relative to the folder that another program is in.
	{"unlink", func(dir string) error { return shell(dir, "rm other || unlink other") }},
	{"mkdir", func(dir string) error { return shell(dir, "mkdir made") }},
}

// work takes all steps, and tells which ones fail.
func work(dir string) (all error) {
	for i, s := range steps {
		// Nothing of this counts.
		if err := aside(dir); err != nil {
			return err
		}
		if err := s.do(dir); err != nil {
			all = errors.Join(all, fmt.Errorf("step %d: %w", i+1, err))
		}
	}
	return all
}

// aside reads below the folder, and changes what is beside it.
func aside(dir string) error {
	if _, err := os.ReadDir(dir); err != nil {
		return err
	}
	f, err := os.OpenFile(dir+"-beside", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString("x")
	return errors.Join(err, f.Sync(), f.Close(), os.Remove(dir+"-beside"))
}

func create(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return f.Close()
}

func with(name string, do func(*os.File) error) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if errors.Is(err, unix.EISDIR) {
		f, err = os.Open(name)
	}
	if err != nil {
		return err
	}
	return errors.Join(do(f), f.Close())
}

func shell(dir, command string) error {
	cmd := exec.Command("sh", "-c", command)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// watch runs the program under a plan and returns what it wrote.
func watch(t *testing.T, p Plan) (w *Watch, took time.Duration, complaint string) {
	t.Helper()
	testkit.NeedRoot(t)
	dir := filepath.Join(t.TempDir(), "dir")
	p.Below = []string{dir}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w = New(p)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), watched+"="+dir)
	var out strings.Builder
	cmd.Stderr = &out
	began := time.Now()
	if err := w.Start(cmd); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	took = time.Since(began)
	if err := w.Wait(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		t.Fatalf("%v: %s", err, out.String())
	}
	return w, took, out.String()
}

func TestEveryChangeIsSeen(t *testing.T) {
	w, _, complaint := watch(t, Plan{})
	if complaint != "" {
		t.Error(complaint)
	}
	var want, got []string
	for _, s := range steps {
		want = append(want, s.call)
	}
	all, failed := w.Seen()
	for _, c := range all {
		got = append(got, strings.Replace(c.Call, "unlinkat", "unlink", 1))
	}
	if !slices.Equal(got, want) || len(failed) > 0 {
		t.Errorf("seen\n%q,\nwant\n%q; failed %v", got, want, failed)
	}
}

func TestEachChangeFails(t *testing.T) {
	for k, s := range steps {
		_, _, complaint := watch(t, Plan{At: k + 1, Error: syscall.EIO})
		if s.call == "unlink" { // rm's failure is made good by unlink
			if complaint != "" {
				t.Error(complaint)
			}
			continue
		}
		if !strings.HasPrefix(complaint, fmt.Sprintf("step %d: ", k+1)) || !strings.Contains(strings.ToLower(complaint), "input/output error") {
			t.Errorf("change %d (%s): %q", k+1, s.call, complaint)
		}
	}
}

// A full disk stays full, and what takes no space goes on.
func TestFullDisk(t *testing.T) {
	w, _, complaint := watch(t, Plan{At: 11, Error: syscall.ENOSPC, Stays: true})
	var got []string
	_, failed := w.Seen()
	for _, c := range failed {
		got = append(got, c.Call)
	}
	if !slices.Equal(got, []string{"symlinkat", "linkat", "renameat", "mkdir"}) || strings.Contains(complaint, "step 14") || strings.Contains(complaint, "step 15") {
		t.Errorf("failed: %q\n%s", got, complaint)
	}
}

// Only some calls, and each takes longer.
func TestDelay(t *testing.T) {
	const delay = 300 * time.Millisecond
	w, took, complaint := watch(t, Plan{Calls: Flushes(), Delay: delay})
	all, _ := w.Seen()
	if complaint != "" || len(all) != 2 || took < 2*delay {
		t.Errorf("%v in %v: %s", all, took, complaint)
	}
}
