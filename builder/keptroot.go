package builder

import (
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tonistiigi/fsutil"
	"golang.org/x/sys/unix"

	"varve.dev/layer"
)

// keptRoot is a kept directory for package fsutil to bring up to date. What was
// in it is known from its layers' manifests: nothing of it is looked at on the
// disk, where a walk would cost more than all the rest of an unchanged build.
type keptRoot struct {
	fsutil.Root
	was    *keptFS
	upper  string
	walked bool
}

func newKeptRoot(root fsutil.Root, was *treeView, upper string) *keptRoot {
	return &keptRoot{Root: root, was: newKeptFS(was), upper: upper}
}

// FS is asked for twice: first for what the directory had before, then for the
// directories whose times have to be set because they are new. Those are all in
// the layer that is being written.
func (r *keptRoot) FS() fs.FS {
	if r.walked {
		return os.DirFS(r.upper)
	}
	r.walked = true
	return r.was
}

// Lstat and Readlink are about what was there, but for names in the directory
// itself: what is to be changed further below is opened from there, and asked
// for itself.
func (r *keptRoot) Lstat(name string) (os.FileInfo, error) {
	if !strings.ContainsRune(name, filepath.Separator) {
		return r.Root.Lstat(name)
	}
	return r.was.Stat(name)
}

func (r *keptRoot) Readlink(name string) (string, error) {
	if e := r.was.view.entries[name]; e != nil {
		return e.Target, nil
	}
	return r.Root.Readlink(name)
}

// OpenFile does not open what would only be asked for its xattrs, which are not
// compared.
func (r *keptRoot) OpenFile(name string, flags int, mode os.FileMode) (*os.File, error) {
	if flags == os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK {
		return nil, &fs.PathError{Op: "open", Path: name, Err: unix.ENXIO}
	}
	return r.Root.OpenFile(name, flags, mode)
}

// keptFS shows the names of a tree and what stat(2) would say of them.
type keptFS struct {
	view     *treeView
	children map[string][]fs.DirEntry
	inodes   map[*layer.Entry]uint64 // of those with several names
}

func newKeptFS(v *treeView) *keptFS {
	k := &keptFS{view: v, children: map[string][]fs.DirEntry{}, inodes: map[*layer.Entry]uint64{}}
	for _, n := range v.names {
		e := v.entries[n]
		if len(e.Names) > 1 && k.inodes[e] == 0 {
			k.inodes[e] = uint64(len(k.inodes) + 1)
		}
		dir := path.Dir(n)
		k.children[dir] = append(k.children[dir], fs.FileInfoToDirEntry(keptInfo{n, e, k.inodes[e]}))
	}
	return k
}

func (k *keptFS) Open(name string) (fs.File, error) {
	return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
}

func (k *keptFS) Stat(name string) (fs.FileInfo, error) {
	if name == "." {
		return keptInfo{name, &layer.Entry{Mode: unix.S_IFDIR | 0o755}, 0}, nil
	}
	e := k.view.entries[name]
	if e == nil {
		return nil, &fs.PathError{Op: "lstat", Path: name, Err: fs.ErrNotExist}
	}
	return keptInfo{name, e, k.inodes[e]}, nil
}

func (k *keptFS) ReadDir(name string) ([]fs.DirEntry, error) { return k.children[name], nil }

// keptInfo is what is known of a file.
type keptInfo struct {
	name  string
	entry *layer.Entry
	inode uint64
}

func (i keptInfo) Name() string       { return path.Base(i.name) }
func (i keptInfo) Mode() fs.FileMode  { return i.entry.FileMode() }
func (i keptInfo) ModTime() time.Time { return time.Unix(0, i.entry.MTime) }
func (i keptInfo) IsDir() bool        { return i.Mode().IsDir() }

func (i keptInfo) Sys() any {
	e := i.entry
	return &syscall.Stat_t{Mode: e.Mode, Uid: e.UID, Gid: e.GID, Rdev: e.Rdev, Ino: i.inode, Nlink: uint64(max(1, len(e.Names)))}
}

func (i keptInfo) Size() int64 {
	return max(i.entry.Size, int64(len(i.entry.Target)))
}
