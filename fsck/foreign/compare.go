package foreign

import (
	"fmt"
	"maps"
	"math"
	"os"
	"path"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

// damage is what is wrong with a file, under each of its names.
type damage struct {
	kind   Kind
	detail string
	notice bool // nothing need be wrong
}

type inode struct{ dev, ino uint64 }

// comparison holds one layer's tree on disk against what its stream says.
// Every file is reached through the open directory it is in.
type comparison struct {
	*object
	folder string // where the tree stands in the store
	// rest is what would have again what is not contents: mode, owner, a link.
	rest string
	// contents looks at the bytes of a file that has the right size. It
	// returns what is wrong, or nothing.
	contents func(e *expected, dirfd int, base string) (string, error)
	below    stack // the layers below
	// shifted says that a user namespace lies between the record's owners and
	// the disk's.
	shifted bool

	owners map[inode]*expected // of files with several names
	buf    []byte
}

// run compares the tree whose root is open.
func (t *comparison) run(root *os.File, want *node) {
	t.owners, t.buf = map[inode]*expected{}, make([]byte, reach.XattrSpace)
	t.children(root, want, "", hiding{})
}

// hiding tells whether what lower layers have in a directory is hidden, by the
// record and by what is on disk.
type hiding struct{ record, disk bool }

// children compares what is in the directory with the name dir.
func (t *comparison) children(d *os.File, want *node, dir string, above hiding) {
	if mark(d, redirectXattrs) != "" {
		t.say(Unchecked, layout.Notice, t.at(dir), "", "overlayfs takes what is in it from a directory of another name (redirect_dir)")
		return
	}
	marked := isOpaque(d)
	t.opaque(d, want, dir, marked, above)
	h := hiding{record: above.record || want.opaque != transparent, disk: above.disk || marked}
	names, err := d.Readdirnames(-1)
	if err != nil {
		t.file(Altered, dir, "%v", err)
		return
	}
	slices.Sort(names)
	for _, base := range names {
		if t.c.ctx.Err() != nil {
			return
		}
		t.name(d, want.children[base], base, path.Join(dir, base), h)
	}
	for _, base := range slices.Sorted(maps.Keys(want.children)) {
		if child := want.children[base]; !child.met {
			t.missing(child, path.Join(dir, base), h)
		}
	}
}

// name compares what has the name in the open directory, and what is below.
func (t *comparison) name(d *os.File, want *node, base, name string, h hiding) {
	var st unix.Stat_t
	if err := unix.Fstatat(int(d.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err != unix.ENOENT {
			t.file(Altered, name, "%v", err)
		}
		return
	}
	if want == nil {
		t.extra(&st, name, h)
		return
	}
	want.met = true
	t.c.read(0, 1)
	t.entry(want, int(d.Fd()), base, name, &st)
	if !want.isDir() || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		t.unmet(want, name, h)
		return
	}
	sub, err := reach.Dir(int(d.Fd()), base)
	if err != nil {
		t.file(Altered, name, "%v", err)
		return
	}
	defer sub.Close()
	t.children(sub, want, name, h)
}

// extra reports what no record names. Sockets are in no layer; a whiteout
// where the record hides everything, or of nothing, changes nothing.
func (t *comparison) extra(st *unix.Stat_t, name string, h hiding) {
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFSOCK || kind == unix.S_IFCHR && st.Rdev == 0 && (h.record || !t.below.has(name)) {
		return
	}
	t.say(Extra, layout.Damage, t.at(name), "remove it", "its record does not name it")
}

// missing reports what a record names, and what is to be below it.
func (t *comparison) missing(want *node, name string, h hiding) {
	switch {
	case want.implied, want.optional:
	case want.elsewhere:
		t.mend(Missing, name, "a hard link into a lower layer is not there")
	case want.isWhiteout() && (h.disk || !t.below.has(name)):
	case want.mode&unix.S_IFMT == unix.S_IFREG && want.size > 0:
		t.file(Missing, name, "a file of %d bytes is not there", want.size)
	case want.isWhiteout():
		t.mend(Missing, name, "the whiteout is not there, so that what a lower layer has shows")
	default:
		t.mend(Missing, name, "%s is not there", typeName(want.mode))
	}
	t.unmet(want, name, h)
}

func (t *comparison) unmet(want *node, name string, h hiding) {
	for _, base := range slices.Sorted(maps.Keys(want.children)) {
		t.missing(want.children[base], path.Join(name, base), h)
	}
}

// entry compares one file.
func (t *comparison) entry(want *node, dirfd int, base, name string, st *unix.Stat_t) {
	if want.elsewhere {
		return
	}
	if st.Mode&unix.S_IFMT != want.mode&unix.S_IFMT {
		t.wrongType(want, name, st)
		return
	}
	if !t.known(want.expected, name, st) {
		want.damages = nil
		t.bytes(want.expected, dirfd, base, st)
		t.attributes(want.expected, dirfd, base, st)
		t.xattrs(want.expected, dirfd, base, st)
	}
	for _, d := range want.damages {
		t.report(d, name)
	}
}

// report reports what is wrong with a file.
func (t *comparison) report(d damage, name string) {
	switch {
	case d.kind == Empty, d.kind == Short, d.kind == Long, d.kind == Altered:
		t.file(d.kind, name, "%s", d.detail)
	case d.notice:
		t.say(d.kind, layout.Notice, t.at(name), t.rest, "%s", d.detail)
	default:
		t.mend(d.kind, name, "%s", d.detail)
	}
}

// wrong notes what is wrong with a file, to be reported with each of its
// names.
func (e *expected) wrong(kind Kind, format string, args ...any) {
	e.damages = append(e.damages, damage{kind: kind, detail: fmt.Sprintf(format, args...)})
}

func (t *comparison) wrongType(want *node, name string, st *unix.Stat_t) {
	report := t.mend
	if want.mode&unix.S_IFMT == unix.S_IFREG && want.size > 0 {
		report = t.file
	}
	report(Type, name, "it is %s, must be %s", typeName(st.Mode), typeName(want.mode))
}

// known compares hard links: the names of one entry are one file, those of two
// are two. It tells whether the file has been compared under another name.
func (t *comparison) known(e *expected, name string, st *unix.Stat_t) bool {
	ino := inode{uint64(st.Dev), st.Ino}
	if e.seen {
		if e.ino == ino {
			return true
		}
		t.mend(Link, name, "no hard link of %q", "/"+e.first)
		return false
	}
	e.seen, e.ino, e.first = true, ino, name
	if st.Nlink > 1 && !e.isDir() && !e.isWhiteout() {
		if other := t.owners[ino]; other != nil {
			t.mend(Link, name, "a hard link of %q, must be a file of its own", "/"+other.first)
		}
		t.owners[ino] = e
	}
	return false
}

// bytes compares a regular file's contents.
func (t *comparison) bytes(e *expected, dirfd int, base string, st *unix.Stat_t) {
	if e.mode&unix.S_IFMT != unix.S_IFREG {
		return
	}
	kind, detail := sizeKind(st.Size, e.size)
	if kind == "" {
		var err error
		if detail, err = t.contents(e, dirfd, base); err != nil {
			detail = err.Error()
		}
		kind = Altered
	}
	switch {
	case detail == "" || t.c.ctx.Err() != nil:
	case kind == Altered && t.isMetacopy(dirfd, base):
		e.damages = append(e.damages, damage{kind: Unchecked, notice: true, detail: "overlayfs takes its contents from a lower layer (metacopy)"})
	default:
		e.wrong(kind, "%s", detail)
	}
}

// attributes compares what lstat says besides.
func (t *comparison) attributes(e *expected, dirfd int, base string, st *unix.Stat_t) {
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFLNK {
		if n, err := unix.Readlinkat(dirfd, base, t.buf); err != nil || string(t.buf[:n]) != e.target {
			e.wrong(Target, "it leads to %q, must to %q", t.buf[:max(n, 0)], e.target)
		}
	}
	if (kind == unix.S_IFCHR || kind == unix.S_IFBLK) && st.Rdev != e.rdev {
		e.wrong(Device, "device %d:%d, must be %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev), unix.Major(e.rdev), unix.Minor(e.rdev))
	}
	if len(e.headers) == 0 {
		return // nothing lists it
	}
	must := e.headers[len(e.headers)-1]
	if perm := st.Mode & 0o7777; kind != unix.S_IFLNK && !slices.ContainsFunc(e.headers, func(a attributes) bool { return a.perm == perm }) {
		e.wrong(Mode, "mode %04o, must be %04o", perm, must.perm)
	}
	owned := func(a attributes) bool { return a.uid == int64(st.Uid) && a.gid == int64(st.Gid) }
	if !t.shifted && !slices.ContainsFunc(e.headers, owned) {
		e.wrong(Owner, "owner %d:%d, must be %d:%d", st.Uid, st.Gid, must.uid, must.gid)
	}
	if !slices.ContainsFunc(e.headers, func(a attributes) bool { return sameTime(st.Mtim, a) }) {
		e.wrong(Time, "modified at %d.%09d, must be %d.%09d", st.Mtim.Sec, st.Mtim.Nsec, must.sec, must.nsec)
	}
}

// sameTime compares a file's time with a header's. An engine that makes a
// layer of a tree that it has writes whole seconds of it; unpackers set what
// is before 1970 to that, and file systems what is after 2038.
func sameTime(have unix.Timespec, must attributes) bool {
	if have.Sec == must.sec && (int(have.Nsec) == must.nsec || must.nsec == 0) {
		return true
	}
	return have.Sec == 0 && (must.sec < 0 || must.sec > math.MaxInt64/int64(time.Second)) ||
		have.Sec == math.MaxInt32 && must.sec > math.MaxInt32 || have.Sec == math.MinInt32 && must.sec < math.MinInt32
}

// file reports wrong contents of a file of the layer.
func (t *comparison) file(kind Kind, name, format string, args ...any) {
	t.found(kind, t.at(name), format, args...)
}

// mend reports what can be made right from the layer's record alone.
func (t *comparison) mend(kind Kind, name, format string, args ...any) {
	t.say(kind, layout.Damage, t.at(name), t.rest, format, args...)
}

func (t *comparison) at(name string) place {
	return place{path: path.Join(t.folder, name), file: "/" + name}
}

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "a regular file"
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFLNK:
		return "a symbolic link"
	case unix.S_IFCHR:
		return "a character device"
	case unix.S_IFBLK:
		return "a block device"
	case unix.S_IFIFO:
		return "a fifo"
	}
	return "a socket"
}
