package powercut

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"varve.dev/internal/faultcall"
)

// Role is what a worker does in the folder dir. It says what it has done
// through mark, which returns when that is known outside the process.
type Role func(dir string, args []string, mark func(format string, args ...any)) error

// Worker is this test program in another process, in one of its roles: the
// process that serves a disk must not touch what stands on it, and a process
// that is killed should not be the test.
//
// It believes in another boot of the machine than everybody else.
type Worker struct {
	Role string
	// Skip names system calls, with commas between, that are to do nothing
	// and succeed, for the whole process: a planted bug. fsync, fdatasync,
	// sync_file_range or syncfs.
	Skip string
	Env  []string // in addition to the test's
	// KillAfter is when the process is killed; 0: never.
	KillAfter time.Duration
	// Patience is when a process that does not end is asked where it hangs:
	// the stacks of its goroutines are in the error. 0: none.
	Patience time.Duration
	// Watch has a say in what its changes to files come to; nil: none. The
	// worker has ended when all that it started has.
	Watch *faultcall.Watch
	Mark  func(note string) // called for each mark
}

const (
	roleVariable = "VARVE_WORKER_ROLE"
	bootVariable = "VARVE_WORKER_BOOT" // a file with the boot id to believe in
	skipVariable = "VARVE_WORKER_SKIP"
)

// Main is for a package's TestMain: it runs the tests, or the role that a
// [Worker] is to play, and returns the exit code.
func Main(m *testing.M, roles map[string]Role) int {
	role := roles[os.Getenv(roleVariable)]
	if role == nil {
		return m.Run()
	}
	if err := play(role); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// The descriptors that a worker talks through.
const (
	marksFd   = 3
	answersFd = 4
)

func play(role Role) error {
	if err := faultcall.Enter(); err != nil {
		return err
	}
	if err := believe(os.Getenv(bootVariable)); err != nil {
		return err
	}
	for name := range strings.SplitSeq(os.Getenv(skipVariable), ",") {
		if name == "" {
			continue
		}
		if err := skip(skippable[name]); err != nil {
			return fmt.Errorf("skip %s: %w", name, err)
		}
	}
	unix.CloseOnExec(marksFd)
	unix.CloseOnExec(answersFd)
	marks, answers := os.NewFile(marksFd, "marks"), os.NewFile(answersFd, "answers")
	var one sync.Mutex
	mark := func(format string, args ...any) {
		one.Lock()
		defer one.Unlock()
		fmt.Fprintf(marks, format+"\n", args...)
		if _, err := answers.Read(make([]byte, 1)); err != nil {
			panic(fmt.Sprintf("nobody listens: %v", err))
		}
	}
	return role(os.Args[1], os.Args[2:], mark)
}

// believe puts a file in the place of the kernel's boot id.
func believe(boot string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	if err := unix.Mount(boot, "/proc/sys/kernel/random/boot_id", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("another boot id: %w", err)
	}
	return nil
}

// skippable are the calls that the order of writes stands on.
var skippable = map[string]uint32{
	"fsync":           unix.SYS_FSYNC,
	"fdatasync":       unix.SYS_FDATASYNC,
	"sync_file_range": unix.SYS_SYNC_FILE_RANGE,
	"syncfs":          unix.SYS_SYNCFS,
}

// skip makes a system call do nothing, and succeed, for the whole process.
func skip(call uint32) error {
	const number = 0 // offset in struct seccomp_data
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: call, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO}, // errno 0
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return errno
	}
	return nil
}

// Run plays the role and hands every mark on. Where the process was killed the
// error is an [exec.ExitError] that says so.
func (w Worker) Run(dir string, args ...string) error {
	boot, err := newBoot()
	if err != nil {
		return err
	}
	defer os.Remove(boot)
	marksR, marksW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer marksR.Close()
	answersR, answersW, err := os.Pipe()
	if err != nil {
		return errors.Join(err, marksW.Close())
	}
	defer answersW.Close()
	cmd := exec.Command(os.Args[0], append([]string{dir}, args...)...)
	cmd.Env = append(os.Environ(), w.Env...)
	cmd.Env = append(cmd.Env, roleVariable+"="+w.Role, bootVariable+"="+boot, skipVariable+"="+w.Skip)
	cmd.ExtraFiles = []*os.File{marksW, answersR} // marksFd, answersFd
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	err = w.start(cmd)
	marksW.Close()
	answersR.Close()
	if err != nil {
		return fmt.Errorf("%s: %w", w.Role, err)
	}
	if w.KillAfter > 0 {
		defer time.AfterFunc(w.KillAfter, func() { _ = cmd.Process.Kill() }).Stop()
	}
	if w.Patience > 0 {
		defer time.AfterFunc(w.Patience, func() { _ = cmd.Process.Signal(syscall.SIGQUIT) }).Stop()
	}
	lines := bufio.NewScanner(marksR)
	for lines.Scan() {
		w.Mark(lines.Text())
		if _, err := answersW.Write([]byte{'.'}); err != nil {
			break // it was killed meanwhile
		}
	}
	if err := cmd.Wait(); err != nil {
		return errors.Join(fmt.Errorf("%s: %w: %s", w.Role, err, strings.TrimSpace(tail(&complaints, 30000))), w.ended())
	}
	return w.ended()
}

func (w Worker) start(cmd *exec.Cmd) error {
	if w.Watch != nil {
		return w.Watch.Start(cmd)
	}
	return cmd.Start()
}

// lingering is how long what a worker started may outlive it.
const lingering = 30 * time.Second

func (w Worker) ended() error {
	if w.Watch != nil {
		return w.Watch.Wait(lingering)
	}
	return nil
}

func tail(b *bytes.Buffer, n int) string {
	data, _ := io.ReadAll(b)
	return string(data[max(0, len(data)-n):])
}

// newBoot returns a file with a boot id that was never there before.
func newBoot() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp("", "boot-")
	if err != nil {
		return "", err
	}
	_, err = f.Write(id)
	return f.Name(), errors.Join(err, f.Close())
}
