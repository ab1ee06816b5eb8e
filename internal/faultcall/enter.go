package faultcall

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// variable has the descriptor of a socket to the watcher and the names of the
// calls to stop at, with commas between.
const variable = "FAULTCALL"

// Enter is what a program calls first that a [Watch] may have started; for
// others it does nothing. It puts itself under the filter and begins once
// more: by an exec the filter is that of the whole process, and until then of
// one thread that does nothing else. Other threads of Go's runtime could stop
// at a call before the watcher has the descriptor that it answers through.
func Enter() error {
	text := os.Getenv(variable)
	if text == "" {
		return nil
	}
	if err := os.Unsetenv(variable); err != nil {
		return err
	}
	names := strings.Split(text, ",")
	socket, err := strconv.Atoi(names[0])
	if err != nil {
		return fmt.Errorf("%s=%s: %w", variable, text, err)
	}
	list, err := numbers(names[1:])
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	listener, err := install(filter(list))
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(socket, []byte{0}, unix.UnixRights(listener), nil, 0); err != nil {
		return fmt.Errorf("to the watcher: %w", err)
	}
	unix.CloseOnExec(socket)
	return syscall.Exec("/proc/self/exe", os.Args, os.Environ())
}

// install puts the calling thread under the filter and returns the descriptor
// that the kernel asks through. A call that was asked about is not interrupted
// by signals any more: it would be asked about once again.
func install(f []unix.SockFilter) (listener int, err error) {
	program := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return 0, fmt.Errorf("seccomp: %w", errno)
	}
	return int(fd), nil
}
