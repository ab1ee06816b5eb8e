package faultcall

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// target returns what a call changes, by its name in the mount namespace of
// whoever makes it; false if it changes nothing, or nothing with a name.
func (c call) target(n notice) (string, bool) {
	if c.path == none {
		fd := int32(n.args[c.file])
		path, ok := n.opened(fd)
		return path, ok && !n.isPipe(fd)
	}
	name, ok := n.text(n.args[c.path])
	if !ok {
		return "", false
	}
	path, ok := n.resolve(c.file, name)
	if ok && (c.flags != none || c.how != none) {
		ok = c.creates(n, path)
	}
	return path, ok
}

// creates tells whether an open changes anything.
func (c call) creates(n notice, path string) bool {
	var flags uint64
	if c.how != none {
		how := make([]byte, 8) // flags are the first of struct open_how
		if n.read(how, n.args[c.how]) != len(how) {
			return false
		}
		flags = binary.NativeEndian.Uint64(how)
	} else {
		flags = n.args[c.flags]
	}
	if flags&creating == unix.O_CREAT {
		// In the mount namespace of the caller.
		_, err := os.Lstat(fmt.Sprintf("/proc/%d/root%s", n.thread, path))
		return err != nil
	}
	return flags&creating != 0
}

// opened is the name of an open file.
func (n notice) opened(fd int32) (string, bool) {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", n.thread, fd))
	return path, err == nil && strings.HasPrefix(path, "/")
}

// isPipe tells whether an open file is a fifo: what is written to one is on no
// disk, and changes no file.
func (n notice) isPipe(fd int32) bool {
	fi, err := os.Stat(fmt.Sprintf("/proc/%d/fd/%d", n.thread, fd))
	return err == nil && fi.Mode()&os.ModeNamedPipe != 0
}

// resolve makes an absolute path of a name in the directory that argument dir
// has open.
func (n notice) resolve(dir int, name string) (string, bool) {
	const own = "/proc/self/fd/"
	if rest, ok := strings.CutPrefix(name, own); ok {
		number, rest, _ := strings.Cut(rest, "/")
		var fd int32
		if _, err := fmt.Sscan(number, &fd); err != nil {
			return "", false
		}
		at, ok := n.opened(fd)
		return filepath.Join(at, rest), ok
	}
	if filepath.IsAbs(name) {
		return filepath.Clean(name), true
	}
	fd := int32(unix.AT_FDCWD)
	if dir != none {
		fd = int32(n.args[dir])
	}
	if fd != unix.AT_FDCWD {
		at, ok := n.opened(fd)
		return filepath.Join(at, name), ok
	}
	at, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", n.thread))
	return filepath.Join(at, name), err == nil
}

// text reads a C string from the caller's memory. None at all stands for "".
func (n notice) text(at uint64) (string, bool) {
	if at == 0 {
		return "", true
	}
	var all []byte
	page := make([]byte, os.Getpagesize())
	for len(all) < unix.PathMax {
		// Not past the page: the next one may not be there.
		got := n.read(page[:len(page)-int(at)%len(page)], at)
		if got == 0 {
			return "", false
		}
		if end := bytes.IndexByte(page[:got], 0); end >= 0 {
			return string(append(all, page[:end]...)), true
		}
		all, at = append(all, page[:got]...), at+uint64(got)
	}
	return "", false
}

// read reads from the caller's memory and returns how many bytes there were.
func (n notice) read(into []byte, at uint64) int {
	local := []unix.Iovec{{Base: &into[0]}}
	local[0].SetLen(len(into))
	got, err := unix.ProcessVMReadv(int(n.thread), local, []unix.RemoteIovec{{Base: uintptr(at), Len: len(into)}}, 0)
	if err != nil {
		return 0
	}
	return got
}
