package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/errdefs"
)

// Parent is a committed layer that a new one is to stand on.
type Parent struct {
	Manifest *Manifest
	Dir      string // where its tree is
}

// lookup finds what overlayfs would show at name on a stack of layers, the
// topmost first.
func lookup(parents []Parent, name string) (*Entry, Parent, bool) {
	for _, p := range parents {
		if e, ok := p.Manifest.Lookup(name); ok {
			return e, p, !e.IsWhiteout()
		}
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if e, ok := p.Manifest.Lookup(dir); ok && (e.Mode&unix.S_IFMT != unix.S_IFDIR || e.IsOpaque()) {
				return nil, p, false // everything below is hidden here
			}
		}
		if p.Manifest.hidesAll() {
			return nil, p, false
		}
	}
	return nil, Parent{}, false
}

// Resolve fills in what the layer takes from its parents, the topmost first.
// A directory that no parent has keeps mode 0755 and root's ownership, and its
// time is the epoch. A hard link's target is copied up with its attributes, as
// link(2) on a mounted overlay does, and the link made to the copy.
//
// Errors: ErrInvalidArgument, naming the entry, for a hard link to something
// that no parent has; others as they come.
func (a *Applied) Resolve(parents []Parent) error {
	buf := make([]byte, copyBuffer)
	moved := map[string]string{} // targets this layer takes away, to where they are now
	for _, l := range a.links {
		if err := a.copyUp(parents, l, moved, buf); err != nil {
			return fmt.Errorf("hard link %q: %w", l.name, err)
		}
	}
	// Copying up may have made more of them.
	seen := map[string]bool{}
	for _, dir := range append(a.implied, a.tree.Implied()...) {
		if seen[dir] {
			continue
		}
		seen[dir] = true
		if err := a.dressDir(parents, dir); err != nil {
			return fmt.Errorf("directory %q: %w", dir, err)
		}
	}
	return errors.Join(a.setTimes(), a.tree.SetDir(".", rootAttr))
}

// dressDir gives an implied directory its lower layer's attributes.
func (a *Applied) dressDir(parents []Parent, dir string) error {
	attr := rootAttr
	e, _, found := lookup(parents, dir)
	if found && e.Mode&unix.S_IFMT == unix.S_IFDIR {
		attr = attrOfEntry(e)
		delete(attr.Xattrs, opaqueXattr) // says something about that layer only
	}
	return a.tree.SetDir(dir, attr)
}

func attrOfEntry(e *Entry) durable.Attr {
	attr := durable.Attr{Mode: e.Mode & 0o7777, UID: int(e.UID), GID: int(e.GID), MTime: e.MTime, Xattrs: map[string]string{}}
	for k, v := range e.Xattrs {
		attr.Xattrs[k] = v
	}
	return attr
}

func (a *Applied) copyUp(parents []Parent, l link, moved map[string]string, buf []byte) error {
	st, there, err := a.tree.Lstat(l.target)
	if err != nil {
		return err
	}
	gone := there && isWhiteout(&st)
	if there && !gone {
		return a.tree.Link(l.name, l.target)
	}
	if at, ok := moved[l.target]; ok {
		return a.tree.Link(l.name, at)
	}
	e, p, found := lookup(parents, l.target)
	if !found {
		return fmt.Errorf("its target %q is in no layer below: %w", l.target, errdefs.ErrInvalidArgument)
	}
	if gone {
		moved[l.target] = l.name
		return a.copyEntry(e, p, l.target, l.name, buf)
	}
	if err := a.copyEntry(e, p, l.target, l.target, buf); err != nil {
		return err
	}
	return a.tree.Link(l.name, l.target)
}

// copyEntry copies the file from of a parent to name in this tree.
func (a *Applied) copyEntry(e *Entry, p Parent, from, name string, buf []byte) error {
	attr := attrOfEntry(e)
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		src, err := openIn(p.Dir, from)
		if err != nil {
			return err
		}
		defer src.Close()
		ino, size, err := a.tree.File(name, attr, src, false, buf)
		if err != nil {
			return err
		}
		if size != e.Size {
			return &errdefs.Corrupt{Invariant: "L4", Object: filepath.Join(p.Dir, from), Detail: "its size is not that of the file manifest"}
		}
		a.sums[ino] = e.SHA256
		return nil
	case unix.S_IFLNK:
		return a.tree.Symlink(name, e.Target, attr)
	case unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO:
		return a.tree.Node(name, e.Mode&unix.S_IFMT, e.Rdev, attr)
	}
	return fmt.Errorf("its target %q is a directory: %w", name, errdefs.ErrInvalidArgument)
}

// openIn opens a regular file of a committed layer; a missing one is damage.
func openIn(dir, name string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &errdefs.Corrupt{Invariant: "L4", Object: filepath.Join(dir, name), Detail: "the file is missing"}
	}
	if err != nil {
		return nil, osError(name, err)
	}
	return f, nil
}

// Sums returns the contents' hashes of what was unpacked, for [Walk].
func (a *Applied) Sums() map[uint64]string { return a.sums }
