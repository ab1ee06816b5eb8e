// Package reach opens what stands in a store or in a layer's tree without ever
// following a link: through the open directory that a name stands in, and
// nothing but directories and regular files. It changes nothing.
package reach

import (
	"errors"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotRegular is what Regular finds instead of a regular file.
var ErrNotRegular = errors.New("not a regular file")

// Regular opens a file for reading if it is a regular one. Nothing else is
// ever opened: a link leads elsewhere, opening a fifo waits, and opening a
// device does things. dirfd is as for openat(2).
func Regular(dirfd int, name string) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dirfd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, &fs.PathError{Op: "open", Path: name, Err: ErrNotRegular}
	}
	full := within(dirfd, name)
	f, err := os.OpenFile(full, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) { // O_NOATIME is for the file's owner
		f, err = os.OpenFile(full, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	}
	return f, err
}

// Dir opens a directory.
func Dir(dirfd int, name string) (*os.File, error) {
	return os.OpenFile(within(dirfd, name), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
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
// xattrs before Linux 6.13, and os.OpenFile.
func within(dirfd int, name string) string {
	if dirfd == unix.AT_FDCWD {
		return name
	}
	return "/proc/self/fd/" + strconv.Itoa(dirfd) + "/" + name
}
