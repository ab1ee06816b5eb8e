package layer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
)

// WalkOptions for [Walk].
type WalkOptions struct {
	// Sums are sha256 sums that are known already, by inode, in hex. What
	// is not in it is read.
	Sums map[uint64]string
	// Known may tell the sum of a file by its name, in its place; may be nil.
	Known func(name string) (sha256 string, ok bool)
	// File is handed every regular file once, open for reading, and closes
	// it: the way to a durable.Barrier. May be nil.
	File func(*os.File) error
}

// Walk describes the tree in dir, which nobody may change meanwhile. Sockets
// are left out: no archive can carry them.
func Walk(ctx context.Context, dir string, opts WalkOptions) (*Manifest, error) {
	w := &walker{ctx: ctx, dir: dir, opts: opts, inodes: map[uint64]int{}, buf: make([]byte, copyBuffer)}
	if err := w.visit("."); err != nil {
		return nil, fmt.Errorf("walk %s: %w", dir, err)
	}
	m := &Manifest{Entries: w.entries}
	for i := range m.Entries {
		slices.Sort(m.Entries[i].Names)
	}
	slices.SortFunc(m.Entries, func(a, b Entry) int { return strings.Compare(a.Names[0], b.Names[0]) })
	return m, nil
}

type walker struct {
	ctx     context.Context
	dir     string
	opts    WalkOptions
	entries []Entry
	inodes  map[uint64]int // of files with several names, to their entry
	buf     []byte
	xattrs  []byte
}

func (w *walker) visit(name string) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	full := path.Join(w.dir, name)
	var st unix.Stat_t
	if err := unix.Lstat(full, &st); err != nil {
		return osError(name, err)
	}
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFSOCK {
		return nil
	}
	if i, ok := w.inodes[st.Ino]; ok {
		w.entries[i].Names = append(w.entries[i].Names, name)
		return nil
	}
	e := Entry{Names: []string{name}, Mode: st.Mode, UID: st.Uid, GID: st.Gid, MTime: st.Mtim.Nano()}
	if err := w.describe(&e, full, &st); err != nil {
		return err
	}
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		w.inodes[st.Ino] = len(w.entries)
	}
	w.entries = append(w.entries, e)
	if kind == unix.S_IFDIR {
		return w.children(name, full)
	}
	return nil
}

func (w *walker) children(name, full string) error {
	list, err := os.ReadDir(full)
	if err != nil {
		return osError(name, err)
	}
	for _, d := range list {
		if err := w.visit(path.Join(name, d.Name())); err != nil {
			return err
		}
	}
	return nil
}

// describe fills in what depends on the type.
func (w *walker) describe(e *Entry, full string, st *unix.Stat_t) (err error) {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Size = st.Size
		e.SHA256, err = w.sum(e.Names[0], full, st)
	case unix.S_IFLNK:
		e.Target, err = os.Readlink(full)
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = st.Rdev
	}
	if err != nil {
		return osError(e.Names[0], err)
	}
	if e.Xattrs, err = w.xattrsOf(full); err != nil {
		return osError("xattrs of "+e.Names[0], err)
	}
	return nil
}

// sum returns the hash of a regular file, and shows the file to opts.File.
func (w *walker) sum(name, full string, st *unix.Stat_t) (string, error) {
	known, ok := w.opts.Sums[st.Ino]
	if !ok && w.opts.Known != nil {
		known, ok = w.opts.Known(name)
	}
	if ok && w.opts.File == nil {
		return known, nil
	}
	f, err := os.OpenFile(full, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	if !ok {
		h := sha256.New()
		if _, err := io.CopyBuffer(h, struct{ io.Reader }{f}, w.buf); err != nil {
			f.Close()
			return "", err
		}
		known = hex.EncodeToString(h.Sum(nil))
	}
	if w.opts.File != nil {
		return known, w.opts.File(f)
	}
	return known, f.Close()
}

// OverlaysOwn tells whether an xattr is overlayfs's note to itself, which is in
// no manifest.
func OverlaysOwn(xattr string) bool {
	return strings.HasPrefix(xattr, overlayXattrs) && xattr != opaqueXattr
}

// xattrsOf returns the xattrs that belong to the layer: overlayfs's notes to
// itself (origin, impure, …) are about the mount that made them.
func (w *walker) xattrsOf(full string) (map[string]string, error) {
	if w.xattrs == nil {
		w.xattrs = make([]byte, 64<<10) // XATTR_LIST_MAX
	}
	n, err := unix.Llistxattr(full, w.xattrs)
	if err == unix.ENOTSUP {
		return nil, nil
	}
	if err != nil || n == 0 {
		return nil, err
	}
	var out map[string]string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(w.xattrs[:n]), "\x00"), "\x00") {
		if OverlaysOwn(name) {
			continue
		}
		value, err := lgetxattr(full, name)
		if err != nil {
			return nil, err
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = value
	}
	return out, nil
}

func lgetxattr(full, name string) (string, error) {
	for size := 256; ; {
		buf := make([]byte, size)
		n, err := unix.Lgetxattr(full, name, buf)
		switch {
		case err == unix.ERANGE && size <= 64<<10: // XATTR_SIZE_MAX
			size *= 16
		case err != nil:
			return "", err
		default:
			return string(buf[:n]), nil
		}
	}
}

func osError(name string, err error) error {
	kind := error(errdefs.ErrUnavailable)
	if os.IsNotExist(err) {
		kind = errdefs.ErrNotFound
	}
	return fmt.Errorf("%s: %w: %w", name, err, kind)
}
