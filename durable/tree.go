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

// Tree writes one file tree below a [Root]: a layer being unpacked. Names come
// from strangers. They are resolved as if the tree were the root of the
// system, links included, so nothing outside of it is ever touched.
//
// Nothing is durable until the tree's barrier was waited for. A Tree belongs
// to one goroutine.
type Tree struct {
	root    *Root
	rel     string
	dir     *os.File
	barrier *Barrier
	parents map[string]*os.File // directories by name as given; see parent
	implied []string
}

// maxParents bounds the directories that a Tree keeps open. Archives list the
// files of a directory together, so few are needed.
const maxParents = 32

// maxLinks is how many symbolic links a name may lead through, as in the
// kernel.
const maxLinks = 40

// NewTree returns a writer of the directory rel, which must exist. Finished
// files go to barrier.
func (r *Root) NewTree(rel string, barrier *Barrier) (*Tree, error) {
	if err := r.may(rel); err != nil {
		return nil, err
	}
	dir, err := os.OpenFile(r.Path(rel), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, kinded("open tree", err)
	}
	return &Tree{root: r, rel: rel, dir: dir, barrier: barrier, parents: map[string]*os.File{}}, nil
}

// Close lets go of the tree's directories.
func (t *Tree) Close() error {
	t.forget()
	return t.dir.Close()
}

// Path returns the absolute path of a name in the tree, for reading.
func (t *Tree) Path(name string) string { return t.root.Path(path.Join(t.rel, name)) }

// Implied returns the directories that were made because something was put
// into them, by their real names in the tree, in the order of making.
func (t *Tree) Implied() []string { return t.implied }

// Attr is what a file has besides its contents. Times are in nanoseconds
// since 1970.
type Attr struct {
	Mode     uint32 // permission, setuid, setgid and sticky bits
	UID, GID int
	MTime    int64
	Xattrs   map[string]string
}

// forget closes the cached directories: a name may lead elsewhere from now on.
func (t *Tree) forget() {
	for name, f := range t.parents {
		f.Close()
		delete(t.parents, name)
	}
}

// split returns the directory that name is in, opened, and its last element.
func (t *Tree) split(name string) (*os.File, string, error) {
	if err := t.root.Poisoned(); err != nil {
		return nil, "", err
	}
	dir, base := path.Split(name)
	if base == "" || base == "." || base == ".." || strings.ContainsRune(base, 0) {
		return nil, "", fmt.Errorf("%q is no name for a file: %w", name, errdefs.ErrInvalidArgument)
	}
	f, err := t.parent(path.Clean(dir))
	return f, base, err
}

// parent opens a directory, making what is missing of it.
func (t *Tree) parent(name string) (*os.File, error) {
	if name == "." {
		return t.dir, nil
	}
	if f, ok := t.parents[name]; ok {
		return f, nil
	}
	f, err := t.open(name, unix.O_PATH|unix.O_DIRECTORY)
	if errors.Is(err, fs.ErrNotExist) {
		if err := t.makeParents(name, maxLinks); err != nil {
			return nil, err
		}
		f, err = t.open(name, unix.O_PATH|unix.O_DIRECTORY)
	}
	if err != nil {
		return nil, kinded("directory "+name, err)
	}
	if len(t.parents) >= maxParents {
		t.forget()
	}
	t.parents[name] = f
	return f, nil
}

// open opens a name as the kernel resolves it with the tree as root.
func (t *Tree) open(name string, flags uint64) (*os.File, error) {
	fd, err := unix.Openat2(int(t.dir.Fd()), name, &unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// makeParents makes the directory name and what is missing above it. A link
// to something that is not there yet is followed, and that is made.
func (t *Tree) makeParents(name string, links int) error {
	if links == 0 {
		return kinded("directory "+name, unix.ELOOP)
	}
	dir, base := path.Split(name)
	up, err := t.parent(path.Clean(dir))
	if err != nil {
		return err
	}
	err = unix.Mkdirat(int(up.Fd()), base, 0o755)
	if errors.Is(err, unix.EEXIST) {
		target, lerr := readlinkat(up, base)
		if lerr != nil {
			return kinded("directory "+name, unix.ENOTDIR)
		}
		return t.makeParents(path.Clean("/" + path.Join(linkBase(target, dir), target))[1:], links-1)
	}
	if err != nil {
		return kinded("directory "+name, err)
	}
	if err := unix.Fchmodat(int(up.Fd()), base, 0o755, 0); err != nil {
		return kinded("directory "+name, err)
	}
	real, err := t.realName(up)
	if err != nil {
		return err
	}
	t.implied = append(t.implied, path.Join(real, base))
	t.root.observe(Op{Kind: OpMkdir, Path: path.Join(t.rel, real, base)})
	return nil
}

// linkBase is what a link's target is relative to.
func linkBase(target, dir string) string {
	if strings.HasPrefix(target, "/") {
		return "/"
	}
	return dir
}

func readlinkat(dir *os.File, base string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), base, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// realName is the name of an open directory in the tree, with no links in it.
func (t *Tree) realName(f *os.File) (string, error) {
	own, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", t.dir.Fd()))
	if err != nil {
		return "", kinded("tree", err)
	}
	real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return "", kinded("tree", err)
	}
	return strings.TrimPrefix(strings.TrimPrefix(real, own), "/"), nil
}

// Lstat returns what stands at name, without following a link there. The
// second result tells whether anything does.
func (t *Tree) Lstat(name string) (unix.Stat_t, bool, error) {
	var st unix.Stat_t
	dir, base := path.Split(name)
	up, ok := t.parents[path.Clean(dir)]
	if path.Clean(dir) == "." {
		up, ok = t.dir, true
	}
	if !ok {
		f, err := t.open(path.Clean(dir), unix.O_PATH|unix.O_DIRECTORY)
		if errors.Is(err, fs.ErrNotExist) {
			return st, false, nil
		}
		if err != nil {
			return st, false, kinded("directory "+dir, err)
		}
		defer f.Close()
		up = f
	}
	err := unix.Fstatat(int(up.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return st, false, nil
	}
	if err != nil {
		return st, false, kinded(name, err)
	}
	return st, true, nil
}

// Mkdir makes a directory, or gives the one that is there these attributes
// but for the time, which [Tree.SetTime] sets when everything is in it.
func (t *Tree) Mkdir(name string, a Attr) error {
	up, base, err := t.split(name)
	if err != nil {
		return err
	}
	if err := unix.Mkdirat(int(up.Fd()), base, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return kinded("directory "+name, err)
	}
	fd, err := unix.Openat(int(up.Fd()), base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return kinded("directory "+name, err)
	}
	defer unix.Close(fd)
	t.root.observe(Op{Kind: OpMkdir, Path: path.Join(t.rel, name)})
	return t.dress(fd, name, a)
}

// Symlink makes a symbolic link, whatever its target is. What is cached of
// directories is forgotten: names may lead through the link from now on.
func (t *Tree) Symlink(name, target string, a Attr) error {
	up, base, err := t.split(name)
	if err != nil {
		return err
	}
	if err := unix.Symlinkat(target, int(up.Fd()), base); err != nil {
		return kinded("symbolic link "+name, err)
	}
	t.root.observe(Op{Kind: OpSymlink, Path: path.Join(t.rel, name), To: target})
	return t.dressAt(up, base, name, a, false)
}

// Node makes a device node or a fifo; kind is unix.S_IFCHR, S_IFBLK or
// S_IFIFO.
func (t *Tree) Node(name string, kind uint32, dev uint64, a Attr) error {
	up, base, err := t.split(name)
	if err != nil {
		return err
	}
	if err := unix.Mknodat(int(up.Fd()), base, kind|0o600, int(dev)); err != nil {
		return kinded("node "+name, err)
	}
	t.root.observe(Op{Kind: OpMknod, Path: path.Join(t.rel, name)})
	return t.dressAt(up, base, name, a, true)
}

// Link makes name another name of target, which is looked up in the tree and
// not followed if it is a link itself. Errors: ErrNotFound if there is no
// target.
func (t *Tree) Link(name, target string) error {
	up, base, err := t.split(name)
	if err != nil {
		return err
	}
	dir, tbase := path.Split(target)
	from := t.dir
	if dir = path.Clean(dir); dir != "." {
		if from, err = t.open(dir, unix.O_PATH|unix.O_DIRECTORY); err != nil {
			return kinded("hard link "+name+" to "+target, err)
		}
		defer from.Close()
	}
	if err := unix.Linkat(int(from.Fd()), tbase, int(up.Fd()), base, 0); err != nil {
		return kinded("hard link "+name+" to "+target, err)
	}
	t.root.observe(Op{Kind: OpLink, Path: path.Join(t.rel, target), To: path.Join(t.rel, name)})
	return nil
}

// Remove takes away what stands at name, with all below it.
func (t *Tree) Remove(name string) error {
	up, base, err := t.split(name)
	if err != nil {
		return err
	}
	err = unix.Unlinkat(int(up.Fd()), base, 0)
	if errors.Is(err, unix.EISDIR) {
		t.forget()
		// RemoveAll follows no links below its argument, and the way to
		// the argument leads through an open directory.
		if up, base, err = t.split(name); err == nil {
			err = os.RemoveAll(fmt.Sprintf("/proc/self/fd/%d/%s", up.Fd(), base))
		}
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return kinded("remove "+name, err)
	}
	t.forget()
	t.root.observe(Op{Kind: OpRemove, Path: path.Join(t.rel, name)})
	return nil
}

// SetDir gives a directory new attributes, its time included; name "." is the
// tree's own directory.
func (t *Tree) SetDir(name string, a Attr) error {
	f, err := t.open(name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return kinded("directory "+name, err)
	}
	defer f.Close()
	if err := t.dress(int(f.Fd()), name, a); err != nil {
		return err
	}
	return t.SetTime(name, a.MTime)
}

// SetTime sets the modification time of a directory.
func (t *Tree) SetTime(name string, mtime int64) error {
	f, err := t.open(name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return kinded("directory "+name, err)
	}
	defer f.Close()
	if err := setTime(int(f.Fd()), "", mtime, unix.AT_EMPTY_PATH); err != nil {
		return kinded("directory "+name, err)
	}
	return nil
}

// SetXattr sets one extended attribute of a directory.
func (t *Tree) SetXattr(name, attr, value string) error {
	f, err := t.open(name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return kinded("directory "+name, err)
	}
	defer f.Close()
	if err := unix.Fsetxattr(int(f.Fd()), attr, []byte(value), 0); err != nil {
		return kinded("extended attribute "+attr+" of "+name, err)
	}
	t.root.observe(Op{Kind: OpSetattr, Path: path.Join(t.rel, name)})
	return nil
}

// RemoveXattr takes an extended attribute from a directory. One that is not
// there is no error.
func (t *Tree) RemoveXattr(name, attr string) error {
	f, err := t.open(name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return kinded("directory "+name, err)
	}
	defer f.Close()
	if err := unix.Fremovexattr(int(f.Fd()), attr); err != nil && !errors.Is(err, unix.ENODATA) {
		return kinded("extended attribute "+attr+" of "+name, err)
	}
	t.root.observe(Op{Kind: OpSetattr, Path: path.Join(t.rel, name)})
	return nil
}

// Ensure makes the directory name if it is not there, with what is missing
// above it; see [Tree.Implied].
func (t *Tree) Ensure(name string) error {
	_, err := t.parent(name)
	return err
}
