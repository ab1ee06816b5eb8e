// Package reach opens what stands in a store or in a layer's tree without ever
// following a link: through the open directory that a name stands in, and
// nothing but directories and regular files. It changes nothing.
package reach

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotRegular is what Regular finds instead of a regular file.
var ErrNotRegular = errors.New("not a regular file")

// beneath opens a name below an open directory. No link is followed, at its
// end or on the way, so nothing outside is ever reached. With AT_FDCWD the name
// is a path that the caller vouches for, but for its end.
func beneath(dirfd int, name string, flags int) (*os.File, error) {
	how := unix.OpenHow{Flags: uint64(flags | unix.O_NOFOLLOW | unix.O_CLOEXEC)}
	if dirfd != unix.AT_FDCWD {
		how.Resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS
	}
	for {
		fd, err := unix.Openat2(dirfd, name, &how)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: name, Err: err}
		}
		return os.NewFile(uintptr(fd), name), nil
	}
}

// Missing tells whether an error says that something is not there, or that the
// way to it is no directory or leads through a link.
func Missing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// Stat describes what stands at a name: a link is a link.
func Stat(dirfd int, name string) (fs.FileInfo, error) {
	f, err := beneath(dirfd, name, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Stat()
}

// Regular opens a file for reading if it is a regular one. Nothing else is
// ever opened: a link leads elsewhere, opening a fifo waits, and opening a
// device does things. dirfd is as for openat(2).
func Regular(dirfd int, name string) (*os.File, error) {
	f, err := beneath(dirfd, name, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fmt.Errorf("%w but %v", ErrNotRegular, fi.Mode().Type())}
	}
	return Again(f)
}

// Again opens an open file once more, for reading, whatever has its name by
// now.
func Again(f *os.File) (*os.File, error) { return again(f, 0) }

func again(f *os.File, flags int) (*os.File, error) {
	itself := "/proc/self/fd/" + strconv.Itoa(int(f.Fd()))
	opened, err := os.OpenFile(itself, os.O_RDONLY|unix.O_NOATIME|flags, 0)
	if errors.Is(err, unix.EPERM) { // O_NOATIME is for the file's owner
		opened, err = os.OpenFile(itself, os.O_RDONLY|flags, 0)
	}
	return opened, err
}

// Dir opens a directory.
func Dir(dirfd int, name string) (*os.File, error) {
	return beneath(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY)
}

// XattrSpace is how long Xattrs' buffer has to be: XATTR_LIST_MAX and
// XATTR_SIZE_MAX.
const XattrSpace = 64 << 10

// Xattrs reads those extended attributes whose names keep wants. It names the
// file and does not open it: a link or a device cannot be.
func Xattrs(dirfd int, name string, buf []byte, keep func(name string) bool) (map[string]string, error) {
	full := within(dirfd, name)
	n, err := unix.Llistxattr(full, buf)
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for x := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if !keep(x) {
			continue
		}
		k, err := unix.Lgetxattr(full, x, buf)
		if err != nil {
			return nil, err
		}
		out[x] = string(buf[:k])
	}
	return out, nil
}

// within is a path to a name in an open directory, for what has no *at form:
// xattrs before Linux 6.13.
func within(dirfd int, name string) string {
	if dirfd == unix.AT_FDCWD {
		return name
	}
	return "/proc/self/fd/" + strconv.Itoa(dirfd) + "/" + name
}
