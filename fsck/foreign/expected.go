package foreign

import (
	"archive/tar"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Names that give an entry of a layer another meaning (OCI image-spec,
// layer.md, "Whiteouts").
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
	xattrRecord    = "SCHILY.xattr."
	capability     = "security.capability"
)

// maxEntries is how many entries of one layer are compared: more would not fit
// in memory.
const maxEntries = 20_000_000

// expected is one file as a layer's stream has it. The names of a hard link
// share one.
type expected struct {
	mode    uint32       // type and permission bits, as lstat says them
	headers []attributes // of each header of the file: unpackers disagree about which counts
	xattrs  map[string]string
	size    int64
	sum     [sha256.Size]byte // of its contents, where they were read
	entry   string            // the name of the entry that has its contents
	target  string
	rdev    uint64
	// implied is a directory that the stream does not list. Whose attributes
	// it gets differs between unpackers.
	implied bool
	opaque  marker
	// elsewhere is a hard link to what only a lower layer has. One who unpacks
	// into a mounted stack gets a copy of it here, under both names.
	elsewhere bool
	// uncapable is a file whose capabilities a later name of it took away: a
	// change of owner drops them.
	uncapable bool

	seen    bool // what follows is known
	ino     inode
	first   string // of its names that was come to
	damages []damage
}

// attributes are what a header says of a file.
type attributes struct {
	perm     uint32
	uid, gid int64
	sec      int64
	nsec     int
}

// marker tells whether a directory hides what is below it.
type marker int

const (
	transparent marker = iota
	mayBeOpaque        // it replaces something: unpackers differ
	opaque
)

// node is a name in the tree.
type node struct {
	*expected
	children map[string]*node // of a directory
	met      bool             // the name is there on disk too
	// optional is the name of an elsewhere that no entry gives.
	optional bool
}

func (e *expected) isDir() bool { return e.mode&unix.S_IFMT == unix.S_IFDIR }

func (e *expected) isWhiteout() bool { return e.mode&unix.S_IFMT == unix.S_IFCHR && e.rdev == 0 }

func impliedDir() *node {
	return &node{expected: &expected{mode: unix.S_IFDIR, implied: true}, children: map[string]*node{}}
}

// expectation makes the tree of a layer's stream.
type expectation struct {
	root    *node
	entries int
	sum     hash.Hash // nil: contents are not hashed
}

// expect reads a layer's stream to the end of its archive.
func expect(stream io.Reader, hashContents bool) (*node, error) {
	x := &expectation{root: impliedDir()}
	if hashContents {
		x.sum = sha256.New()
	}
	for r := tar.NewReader(stream); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return x.root, nil
		}
		if err != nil {
			return nil, err
		}
		if x.entries++; x.entries > maxEntries {
			return nil, fmt.Errorf("it has more than %d entries", maxEntries)
		}
		if err := x.add(h, r); err != nil {
			return nil, fmt.Errorf("%q: %w", h.Name, err)
		}
	}
}

// add does to the tree what unpacking the entry does to a disk.
func (x *expectation) add(h *tar.Header, contents io.Reader) error {
	name := path.Clean("/" + h.Name)
	if name == "/" || h.Typeflag == tar.TypeXGlobalHeader {
		return nil // the root directory's attributes are the engine's own
	}
	dir, base := path.Split(name)
	parent := x.dir(dir)
	if parent == nil {
		return errors.New("what it stands in is no directory")
	}
	switch {
	case base == opaqueName:
		parent.opaque = opaque
		return nil
	case strings.HasPrefix(base, whiteoutPrefix):
		parent.children[strings.TrimPrefix(base, whiteoutPrefix)] = &node{expected: &expected{mode: unix.S_IFCHR}}
		return nil
	case h.Typeflag == tar.TypeLink:
		x.link(parent, base, h)
		return nil
	}
	e, err := x.file(h, name, contents)
	if err != nil {
		return err
	}
	x.put(parent, base, e)
	return nil
}

// put gives a name to a file. A directory that is there keeps what is in it.
func (x *expectation) put(parent *node, base string, e *expected) {
	old := parent.children[base]
	n := &node{expected: e}
	if e.isDir() {
		n.children = map[string]*node{}
		if old != nil && old.isDir() {
			n.children, e.opaque = old.children, old.opaque
			e.xattrs = merged(old.xattrs, e.xattrs)
		} else if old != nil {
			e.opaque = mayBeOpaque
		}
	}
	parent.children[base] = n
}

// merged is what is set by two headers, one after the other.
func merged(first, second map[string]string) map[string]string {
	out := maps.Clone(first)
	if out == nil {
		return second
	}
	maps.Copy(out, second)
	return out
}

// link gives another name to what has the name h.Linkname.
func (x *expectation) link(parent *node, base string, h *tar.Header) {
	dir, last := path.Split(path.Clean("/" + h.Linkname))
	at := x.dir(dir)
	if at == nil {
		return
	}
	target := at.children[last]
	if target == nil || target.isWhiteout() || target.isDir() {
		target = &node{expected: &expected{elsewhere: true}, optional: true}
		if at.children[last] == nil {
			at.children[last] = target
		}
	} else if !target.elsewhere {
		if a := attributesOf(h); !slices.Contains(target.headers, a) {
			target.headers = append(target.headers, a)
		}
		xattrs := xattrsOf(h)
		target.uncapable = xattrs[capability] == "" && target.xattrs[capability] != ""
		target.xattrs = merged(target.xattrs, xattrs)
	}
	parent.children[base] = &node{expected: target.expected}
}

// file is what an entry says of a file that is none of the special ones.
func (x *expectation) file(h *tar.Header, name string, contents io.Reader) (*expected, error) {
	e := &expected{headers: []attributes{attributesOf(h)}, xattrs: xattrsOf(h), entry: strings.TrimPrefix(name, "/")}
	types := map[byte]uint32{
		tar.TypeDir: unix.S_IFDIR, tar.TypeSymlink: unix.S_IFLNK, tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK,
		tar.TypeFifo: unix.S_IFIFO, tar.TypeReg: unix.S_IFREG, tar.TypeGNUSparse: unix.S_IFREG,
	}
	kind, ok := types[h.Typeflag]
	if !ok {
		return nil, fmt.Errorf("an entry of type %q", h.Typeflag)
	}
	e.mode = kind | e.headers[0].perm
	switch kind {
	case unix.S_IFLNK:
		e.target = h.Linkname
	case unix.S_IFCHR, unix.S_IFBLK:
		e.rdev = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
	case unix.S_IFREG:
		e.size = h.Size
		if x.sum != nil {
			x.sum.Reset()
			if _, err := io.Copy(x.sum, contents); err != nil {
				return nil, err
			}
			x.sum.Sum(e.sum[:0])
		}
	}
	return e, nil
}

func attributesOf(h *tar.Header) attributes {
	return attributes{
		perm: uint32(h.Mode & 0o7777), uid: int64(h.Uid), gid: int64(h.Gid), sec: h.ModTime.Unix(), nsec: h.ModTime.Nanosecond(),
	}
}

func xattrsOf(h *tar.Header) (out map[string]string) {
	for key, value := range h.PAXRecords {
		if x, ok := strings.CutPrefix(key, xattrRecord); ok {
			if out == nil {
				out = map[string]string{}
			}
			out[x] = value
		}
	}
	return out
}

// maxLinks is how many symbolic links lead to one name, as in Linux.
const maxLinks = 40

// dir finds a directory as one who unpacks finds it: links of this layer are
// followed, with the tree as their root. What is missing is made. Nil: there is
// something else.
func (x *expectation) dir(name string) *node {
	at, links := []*node{x.root}, 0
	for todo := strings.Split(name, "/"); len(todo) > 0; {
		base := todo[0]
		todo = todo[1:]
		switch base {
		case "", ".":
			continue
		case "..":
			at = at[:max(1, len(at)-1)]
			continue
		}
		parent := at[len(at)-1]
		child := parent.children[base]
		switch {
		case child == nil || child.isWhiteout():
			child = impliedDir()
			if parent.children[base] != nil {
				child.opaque = mayBeOpaque
			}
			parent.children[base] = child
		case child.mode&unix.S_IFMT == unix.S_IFLNK:
			if links++; links > maxLinks {
				return nil
			}
			if path.IsAbs(child.target) {
				at = at[:1]
			}
			todo = append(strings.Split(child.target, "/"), todo...)
			continue
		case !child.isDir():
			return nil
		}
		at = append(at, child)
	}
	return at[len(at)-1]
}
