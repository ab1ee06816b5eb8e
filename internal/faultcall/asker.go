package faultcall

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// asker is the descriptor through which the kernel asks.
type asker int

// notice is struct seccomp_notif.
type notice struct {
	id     uint64
	thread uint32
	_      uint32
	number uint32
	_      uint32
	_      uint64
	args   [6]uint64
}

// reply is struct seccomp_notif_resp.
type reply struct {
	id    uint64
	_     int64
	errno int32
	flags uint32
}

func (a asker) control(request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(a), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// wakeTogether has the kernel hand the processor over with the question and
// with the answer. Kernels before 6.6 cannot, and are slower.
func (a asker) wakeTogether() {
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(a), unix.SECCOMP_IOCTL_NOTIF_SET_FLAGS, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
}

// next waits for a question. more is false when nobody is left who could ask.
func (a asker) next() (n notice, more bool, err error) {
	for {
		fds := []unix.PollFd{{Fd: int32(a), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return n, false, fmt.Errorf("wait for calls: %w", err)
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			if fds[0].Revents != 0 {
				return n, false, nil
			}
			continue
		}
		n = notice{} // the kernel insists
		err := a.control(unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n))
		if err == nil {
			return n, true, nil
		}
		// Whoever asked may have been killed meanwhile.
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINTR) {
			return n, false, fmt.Errorf("receive a call: %w", err)
		}
	}
}

// valid tells whether the thread that asks is still waiting.
func (a asker) valid(n notice) bool {
	return a.control(unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&n.id)) == nil
}

// answer lets the call go on, for 0, or fail. One that is gone needs none.
func (a asker) answer(n notice, errno syscall.Errno) {
	r := reply{id: n.id, errno: -int32(errno)}
	if errno == 0 {
		r.flags = unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE
	}
	_ = a.control(unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
}

// receive takes the listener from the socket; -1 if the program has ended
// before it sent one.
func receive(socket int) (int, error) {
	rights := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, make([]byte, 1), rights, 0)
	if err != nil {
		return -1, fmt.Errorf("receive the listener: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil || len(messages) == 0 {
		return -1, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, err
	}
	unix.CloseOnExec(fds[0])
	return fds[0], nil
}
