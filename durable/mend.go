package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
)

// Mender replaces single names of a tree that others may be reading, mounted
// or not. What is taken out of the tree goes to a directory of its own, the
// place, with its inode; nothing is deleted. No name is followed through a
// link, so nothing outside of the tree is touched.
//
// Each exchange is one rename(2): a crash leaves what was there or what is to
// be there. Names are durable after [Mender.Sync]. A Mender belongs to one
// goroutine.
type Mender struct {
	root       *Root
	rel, place string
	tree, bad  *os.File
	changed    map[string]bool // directories, by name in the tree
}

// NewMender returns a mender of the directory tree, with the directory place
// for what is taken out. Both must exist, on one file system.
func (r *Root) NewMender(tree, place string) (*Mender, error) {
	if err := r.may(tree, place); err != nil {
		return nil, err
	}
	t, err := openDirectory(r.Path(tree))
	if err != nil {
		return nil, kinded("open tree", err)
	}
	p, err := openDirectory(r.Path(place))
	if err != nil {
		t.Close()
		return nil, kinded("open place", err)
	}
	return &Mender{root: r, rel: tree, place: place, tree: t, bad: p, changed: map[string]bool{}}, nil
}

func openDirectory(path string) (*os.File, error) {
	return os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// Close lets go of the directories.
func (m *Mender) Close() error { return errors.Join(m.tree.Close(), m.bad.Close()) }

// Put gives what stands in the place as from, durable already, the name in the
// tree. What had the name stands in the place as from afterwards, and the
// result tells whether anything did.
func (m *Mender) Put(from, name string) (had bool, err error) {
	up, base, err := m.split(name)
	if err != nil {
		return false, err
	}
	defer up.Close()
	err = unix.Renameat2(int(m.bad.Fd()), from, int(up.Fd()), base, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		had = true
		err = unix.Renameat2(int(m.bad.Fd()), from, int(up.Fd()), base, unix.RENAME_EXCHANGE)
	}
	if err != nil {
		return had, kinded("put "+name, err)
	}
	m.changed[path.Dir(name)] = true
	return had, nil
}

// Take moves a name out of the tree, into the place as to, with all below it.
func (m *Mender) Take(name, to string) error {
	up, base, err := m.split(name)
	if err != nil {
		return err
	}
	defer up.Close()
	if err := unix.Renameat2(int(up.Fd()), base, int(m.bad.Fd()), to, unix.RENAME_NOREPLACE); err != nil {
		return kinded("take "+name, err)
	}
	m.changed[path.Dir(name)] = true
	return nil
}

// Link makes another name, to, in the place for the file that has the name in
// the tree.
func (m *Mender) Link(name, to string) error {
	up, base, err := m.split(name)
	if err != nil {
		return err
	}
	defer up.Close()
	if err := unix.Linkat(int(up.Fd()), base, int(m.bad.Fd()), to, 0); err != nil {
		return kinded("link "+name, err)
	}
	return nil
}

// Dress gives a name in the tree these attributes, and no other xattrs but
// those that keep spares; "." is the tree's own directory. In place: see
// docs/design/0006 for who sees what when.
func (m *Mender) Dress(name string, a Attr, keep func(xattr string) bool) error {
	up, base := m.tree, "."
	if name != "." {
		var err error
		if up, base, err = m.split(name); err != nil {
			return err
		}
		defer up.Close()
	}
	at := fmt.Sprintf("/proc/self/fd/%d/%s", up.Fd(), base)
	var st unix.Stat_t
	if err := unix.Lstat(at, &st); err != nil {
		return kinded("attributes of "+name, err)
	}
	if err := dropXattrs(at, func(x string) bool { _, wanted := a.Xattrs[x]; return wanted || keep(x) }); err != nil {
		return kinded("attributes of "+name, err)
	}
	// chown takes set-uid bits and capabilities away: owner, mode, xattrs,
	// then the time that all of them change.
	tree := &Tree{root: m.root, rel: m.rel}
	if err := tree.dressAt(up, base, name, a, st.Mode&unix.S_IFMT != unix.S_IFLNK); err != nil {
		return err
	}
	m.changed[path.Dir(name)] = true
	return nil
}

func dropXattrs(at string, keep func(string) bool) error {
	list := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err := unix.Llistxattr(at, list)
	if err == unix.ENOTSUP || n == 0 && err == nil {
		return nil
	}
	if err != nil {
		return err
	}
	for x := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if keep(x) {
			continue
		}
		if err := unix.Lremovexattr(at, x); err != nil {
			return err
		}
	}
	return nil
}

// SetTime sets the time of a directory of the tree, which every exchange in it
// has changed.
func (m *Mender) SetTime(name string, mtime int64) error {
	f, err := m.open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := setTime(int(f.Fd()), "", mtime, unix.AT_EMPTY_PATH); err != nil {
		return kinded("time of "+name, err)
	}
	return nil
}

// Changed returns the directories in which names were exchanged.
func (m *Mender) Changed() (dirs []string) {
	for d := range m.changed {
		dirs = append(dirs, d)
	}
	return dirs
}

// Sync makes every name and attribute durable that was changed. A failure
// poisons the root.
func (m *Mender) Sync() error {
	dirs := []string{m.place}
	for d := range m.changed {
		dirs = append(dirs, path.Join(m.rel, d))
	}
	return m.root.SyncNames(dirs...)
}

// split returns the directory that a name is in, opened, and its last element.
func (m *Mender) split(name string) (*os.File, string, error) {
	if err := m.root.Poisoned(); err != nil {
		return nil, "", err
	}
	dir, base := path.Split(name)
	if base == "" || base == "." || base == ".." || strings.ContainsRune(base, 0) {
		return nil, "", fmt.Errorf("%q is no name for a file: %w", name, errdefs.ErrInvalidArgument)
	}
	f, err := m.open(path.Clean(dir))
	return f, base, err
}

// SetMode gives a file of the store another mode, durably.
func (r *Root) SetMode(rel string, perm fs.FileMode) error {
	if err := r.may(rel); err != nil {
		return err
	}
	f, err := os.OpenFile(r.Path(rel), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return kinded("set mode", err)
	}
	defer f.Close()
	if err := f.Chmod(perm); err != nil {
		return kinded("set mode", err)
	}
	r.observe(Op{Kind: OpSetattr, Path: rel})
	if err := f.Sync(); err != nil {
		return r.failedSync(rel, err)
	}
	return nil
}

// OpenBelow opens a file of a tree for reading, without following a link.
func (r *Root) OpenBelow(tree, name string) (*os.File, error) {
	dir, err := openDirectory(r.Path(tree))
	if err != nil {
		return nil, kinded("open tree", err)
	}
	defer dir.Close()
	fd, err := unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, kinded(name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (m *Mender) open(dir string) (*os.File, error) {
	fd, err := unix.Openat2(int(m.tree.Fd()), dir, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil, kinded("directory "+dir, err)
	}
	return os.NewFile(uintptr(fd), dir), nil
}
