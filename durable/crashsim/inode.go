package crashsim

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// inode is one file of any type, by whatever names.
type inode struct {
	typ    uint32 // unix.S_IFMT bits
	rdev   uint64
	target string // of a symbolic link

	attr    attr
	durable *attr // nil until it was made durable for the first time

	// Contents of a regular file. synced may share memory with live; see
	// write and resize.
	live, synced []byte

	// Names in a directory: as seen, and as durable.
	names, kept map[string]*inode
}

// attr is what a file has besides contents and names.
type attr struct {
	mode     uint32
	uid, gid int
	mtime    unix.Timespec
	xattrs   map[string]string
}

func (i *inode) isDir() bool { return i.typ == unix.S_IFDIR }

// write puts data at off. Bytes that are durable are never changed in place.
func (i *inode) write(off int64, data []byte) {
	end := off + int64(len(data))
	if off < int64(len(i.synced)) {
		i.live = slices.Clone(i.live)
	}
	if grow := end - int64(len(i.live)); grow > 0 {
		i.live = append(i.live, make([]byte, grow)...)
	}
	copy(i.live[off:end], data)
}

func (i *inode) resize(size int64) {
	if grow := size - int64(len(i.live)); grow > 0 {
		i.live = append(i.live, make([]byte, grow)...)
		return
	}
	// The capacity goes too: appending must not reach durable bytes.
	i.live = i.live[:size:size]
}

func (i *inode) syncData() {
	i.synced = i.live[:len(i.live):len(i.live)]
	i.syncAttr()
}

func (i *inode) syncAttr() {
	a := i.attr
	i.durable = &a
}

// load reads the file at path, which is below dir, with everything below it.
// Two names of one file become one inode through seen.
func load(path string, seen map[uint64]*inode) (*inode, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return nil, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	if i, ok := seen[st.Ino]; ok && st.Nlink > 1 && i.typ == st.Mode&unix.S_IFMT {
		return i, nil
	}
	i := &inode{typ: st.Mode & unix.S_IFMT, rdev: st.Rdev}
	seen[st.Ino] = i
	var err error
	if i.attr, err = readAttr(path, &st); err != nil {
		return nil, err
	}
	switch i.typ {
	case unix.S_IFREG:
		i.live, err = os.ReadFile(path)
	case unix.S_IFLNK:
		i.target, err = os.Readlink(path)
	case unix.S_IFDIR:
		i.names, i.kept = map[string]*inode{}, map[string]*inode{}
	}
	return i, err
}

func readAttr(path string, st *unix.Stat_t) (attr, error) {
	a := attr{mode: st.Mode &^ unix.S_IFMT, uid: int(st.Uid), gid: int(st.Gid), mtime: st.Mtim}
	list, err := sized(func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) })
	if errors.Is(err, unix.ENOTSUP) {
		return a, nil
	}
	if err != nil {
		return a, &fs.PathError{Op: "listxattr", Path: path, Err: err}
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(list, "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value, err := sized(func(buf []byte) (int, error) { return unix.Lgetxattr(path, name, buf) })
		if err != nil {
			return a, &fs.PathError{Op: "getxattr", Path: path, Err: err}
		}
		if a.xattrs == nil {
			a.xattrs = map[string]string{}
		}
		a.xattrs[name] = value
	}
	return a, nil
}

// sized asks read for the length of its answer, and then for the answer.
func sized(read func([]byte) (int, error)) (string, error) {
	n, err := read(nil)
	if err != nil || n == 0 {
		return "", err
	}
	buf := make([]byte, n)
	n, err = read(buf)
	return string(buf[:max(n, 0)]), err
}
