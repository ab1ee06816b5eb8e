package powercut

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A worker is this test program in another process, in one of the roles: the
// one that serves a disk must not touch what stands on it.
const (
	roleVariable = "VARVE_POWERCUT_ROLE"
	bootVariable = "VARVE_POWERCUT_BOOT" // a file with the boot id to believe in
	// skipVariable names a system call that is to do nothing and succeed: a
	// planted bug.
	skipVariable = "VARVE_POWERCUT_SKIP"
)

// roles get a folder on the disk and say what they have done through mark,
// which returns when it is in the log.
var roles = map[string]func(dir string, args []string, mark func(format string, args ...any)) error{
	"careless": careless,
	"careful":  careful,
	"store":    workOnStore,
	"recover":  recoverStore,
}

func TestMain(m *testing.M) {
	role := roles[os.Getenv(roleVariable)]
	if role == nil {
		os.Exit(m.Run())
	}
	if err := asWorker(role); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// The descriptors that a worker talks through.
const (
	marksFd   = 3
	answersFd = 4
)

func asWorker(role func(string, []string, func(string, ...any)) error) error {
	if boot := os.Getenv(bootVariable); boot != "" {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("private mounts: %w", err)
		}
		if err := unix.Mount(boot, "/proc/sys/kernel/random/boot_id", "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("another boot id: %w", err)
		}
	}
	if name := os.Getenv(skipVariable); name != "" {
		if err := skip(skippable[name]); err != nil {
			return fmt.Errorf("skip %s: %w", name, err)
		}
	}
	marks, answers := os.NewFile(marksFd, "marks"), os.NewFile(answersFd, "answers")
	mark := func(format string, args ...any) {
		fmt.Fprintf(marks, format+"\n", args...)
		if _, err := answers.Read(make([]byte, 1)); err != nil {
			panic(fmt.Sprintf("the log is gone: %v", err))
		}
	}
	return role(os.Args[1], os.Args[2:], mark)
}

// skippable are the calls that the order of writes stands on.
var skippable = map[string]uint32{
	"fsync":           unix.SYS_FSYNC,
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

// worker is what a role runs on.
type worker struct {
	role string
	skip string // a call that does nothing; see skippable
	mark func(string)
}

// run runs the role, with a boot id of its own, and hands every mark on.
func (w worker) run(t *testing.T, dir string, args ...string) error {
	t.Helper()
	boot := filepath.Join(t.TempDir(), "boot")
	if err := os.WriteFile(boot, []byte(newBoot()+"\n"), 0o444); err != nil {
		return err
	}
	marksR, marksW, err := os.Pipe()
	if err != nil {
		return err
	}
	answersR, answersW, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd := exec.Command(os.Args[0], append([]string{dir}, args...)...)
	cmd.Env = append(os.Environ(), roleVariable+"="+w.role, bootVariable+"="+boot, skipVariable+"="+w.skip)
	cmd.ExtraFiles = []*os.File{marksW, answersR}
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	err = cmd.Start()
	marksW.Close()
	answersR.Close()
	if err == nil {
		lines := bufio.NewScanner(marksR)
		for lines.Scan() {
			w.mark(lines.Text())
			if _, err := answersW.Write([]byte{'.'}); err != nil {
				break
			}
		}
		err = cmd.Wait()
	}
	err = errors.Join(err, marksR.Close(), answersW.Close())
	if err != nil {
		return fmt.Errorf("%s: %w: %s", w.role, err, strings.TrimSpace(tail(&complaints, 4000)))
	}
	return nil
}

func tail(b *bytes.Buffer, n int) string {
	data, _ := io.ReadAll(b)
	return string(data[max(0, len(data)-n):])
}

// newBoot has the form of a boot id.
func newBoot() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	if err != nil {
		panic(err)
	}
	return strings.TrimSpace(string(id))
}
