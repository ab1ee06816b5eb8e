package builder

import (
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tonistiigi/fsutil"
	"golang.org/x/sys/unix"

	"varve.dev/layer"
)

// keptRoot is a kept directory for package fsutil to bring up to date. What was
// in it is known from its layers' manifests: nothing of it is looked at on the
// disk, where a walk would cost more than all the rest of an unchanged build. The
// layer for what has changed is made when something has.
type keptRoot struct {
	was    *keptFS
	open   func() (fsutil.Root, error)
	upper  func() string // the changes, once there are any
	walked bool

	mu   sync.Mutex
	real atomic.Pointer[fsutil.Root] // after the first change
}

// do does something with the directory as it is, with the layer that takes the
// changes.
func (r *keptRoot) do(fn func(fsutil.Root) error) error {
	r.mu.Lock()
	root := r.real.Load()
	if root == nil {
		opened, err := r.open()
		if err != nil {
			r.mu.Unlock()
			return err
		}
		root = &opened
		r.real.Store(root)
	}
	r.mu.Unlock()
	return fn(*root)
}

func (r *keptRoot) Close() error {
	if root := r.real.Load(); root != nil {
		return (*root).Close()
	}
	return nil
}

// FS is asked for twice: first for what the directory had before, then for the
// directories whose times have to be set because they are new. Those are all in
// the layer that is being written.
func (r *keptRoot) FS() fs.FS {
	switch {
	case !r.walked:
		r.walked = true
		return r.was
	case r.real.Load() != nil:
		return os.DirFS(r.upper())
	}
	return newKeptFS(newTreeView(nil))
}

// Lstat and Readlink are about what was there, but for names in the directory
// itself once it is written to: what is to be changed further below is opened
// from there, and asked for itself.
func (r *keptRoot) Lstat(name string) (os.FileInfo, error) {
	if root := r.real.Load(); root != nil && !strings.ContainsRune(name, filepath.Separator) {
		return (*root).Lstat(name)
	}
	return r.was.Stat(name)
}

func (r *keptRoot) Readlink(name string) (string, error) {
	if e := r.was.view.entries[name]; e != nil {
		return e.Target, nil
	}
	return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrNotExist}
}

// OpenFile does not open what would only be asked for its xattrs, which are not
// compared.
func (r *keptRoot) OpenFile(name string, flags int, mode os.FileMode) (f *os.File, err error) {
	if flags == os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK {
		return nil, &fs.PathError{Op: "open", Path: name, Err: unix.ENXIO}
	}
	err = r.do(func(root fsutil.Root) (err error) { f, err = root.OpenFile(name, flags, mode); return err })
	return f, err
}

func (r *keptRoot) OpenRoot(name string) (sub *os.Root, err error) {
	err = r.do(func(root fsutil.Root) (err error) { sub, err = root.OpenRoot(name); return err })
	return sub, err
}

func (r *keptRoot) Stat(name string) (fi os.FileInfo, err error) {
	err = r.do(func(root fsutil.Root) (err error) { fi, err = root.Stat(name); return err })
	return fi, err
}

func (r *keptRoot) Remove(name string) error {
	return r.do(func(root fsutil.Root) error { return root.Remove(name) })
}

func (r *keptRoot) RemoveAll(name string) error {
	return r.do(func(root fsutil.Root) error { return root.RemoveAll(name) })
}

func (r *keptRoot) Mkdir(name string, mode os.FileMode) error {
	return r.do(func(root fsutil.Root) error { return root.Mkdir(name, mode) })
}

func (r *keptRoot) Symlink(target, name string) error {
	return r.do(func(root fsutil.Root) error { return root.Symlink(target, name) })
}

func (r *keptRoot) Link(old, name string) error {
	return r.do(func(root fsutil.Root) error { return root.Link(old, name) })
}

func (r *keptRoot) Rename(old, name string) error {
	return r.do(func(root fsutil.Root) error { return root.Rename(old, name) })
}

func (r *keptRoot) Lchown(name string, uid, gid int) error {
	return r.do(func(root fsutil.Root) error { return root.Lchown(name, uid, gid) })
}

func (r *keptRoot) Chmod(name string, mode os.FileMode) error {
	return r.do(func(root fsutil.Root) error { return root.Chmod(name, mode) })
}

func (r *keptRoot) Chtimes(name string, atime, mtime time.Time) error {
	return r.do(func(root fsutil.Root) error { return root.Chtimes(name, atime, mtime) })
}

func (r *keptRoot) LSetxattr(name, key string, value []byte, flags int) error {
	return r.do(func(root fsutil.Root) error { return root.LSetxattr(name, key, value, flags) })
}

func (r *keptRoot) Mknod(name string, mode uint32, dev int) error {
	return r.do(func(root fsutil.Root) error { return root.Mknod(name, mode, dev) })
}

func (r *keptRoot) LChtimes(name string, mtime time.Time) error {
	return r.do(func(root fsutil.Root) error { return root.LChtimes(name, mtime) })
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
