package durable

import (
	"fmt"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// dress sets owner, mode and extended attributes of an open file. The owner
// comes first: changing it takes setuid bits and capabilities away.
func (t *Tree) dress(fd int, name string, a Attr) error {
	if err := unix.Fchown(fd, a.UID, a.GID); err != nil {
		return kinded("owner of "+name, err)
	}
	if err := unix.Fchmod(fd, a.Mode); err != nil {
		return kinded("mode of "+name, err)
	}
	for attr, value := range a.Xattrs {
		if err := unix.Fsetxattr(fd, attr, []byte(value), 0); err != nil {
			return kinded("extended attribute "+attr+" of "+name, err)
		}
	}
	t.root.observe(Op{Kind: OpSetattr, Path: path.Join(t.rel, name)})
	return nil
}

// dressAt does the same, and the time, for what cannot be opened.
func (t *Tree) dressAt(up *os.File, base, name string, a Attr, mode bool) error {
	fd := int(up.Fd())
	if err := unix.Fchownat(fd, base, a.UID, a.GID, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return kinded("owner of "+name, err)
	}
	if mode {
		if err := unix.Fchmodat(fd, base, a.Mode, 0); err != nil {
			return kinded("mode of "+name, err)
		}
	}
	for attr, value := range a.Xattrs {
		if err := unix.Lsetxattr(fmt.Sprintf("/proc/self/fd/%d/%s", fd, base), attr, []byte(value), 0); err != nil {
			return kinded("extended attribute "+attr+" of "+name, err)
		}
	}
	if err := setTime(fd, base, a.MTime, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return kinded("time of "+name, err)
	}
	t.root.observe(Op{Kind: OpSetattr, Path: path.Join(t.rel, name)})
	return nil
}

func setTime(fd int, name string, mtime int64, flags int) error {
	ts := unix.NsecToTimespec(mtime)
	return unix.UtimesNanoAt(fd, name, []unix.Timespec{ts, ts}, flags)
}
