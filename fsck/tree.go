package fsck

import (
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

// layerTree: L4, one worker for a layer.
func (c *checker) layerTree(f found) {
	var g errgroup.Group
	g.SetLimit(c.opts.Workers)
	for id, rec := range c.rec.layers {
		if c.only != nil && !c.only[layerObject(id)] {
			continue
		}
		g.Go(func() error {
			if c.ctx.Err() == nil {
				c.compareTree(id, rec, f)
			}
			return nil
		})
	}
	_ = g.Wait()
}

// compareTree holds one tree against its file manifest. Without either, L1 or
// L3 has said so.
func (c *checker) compareTree(id layout.LayerID, rec layout.LayerRecord, f found) {
	wants, err := c.manifest(rec.Manifest)
	if err != nil || !c.isDir(treePath(id)) {
		return
	}
	t := &tree{
		c:     c,
		found: func(name, format string, args ...any) { f(layerObject(id), name, format, args...) },
		wants: map[string]*want{}, inodes: map[*want]inode{}, owners: map[inode]*want{},
		buf: make([]byte, reach.XattrSpace),
	}
	for i := range wants {
		for _, n := range wants[i].names {
			t.wants[n] = &wants[i]
		}
	}
	root, err := reach.Dir(c.fd(), treePath(id))
	if err != nil {
		t.found(".", "%v", err)
		return
	}
	defer root.Close()
	t.root = root
	t.entry(int(root.Fd()), ".", ".")
	t.children(root, ".")
	if c.ctx.Err() != nil {
		return // what was not come to is not missing
	}
	for _, name := range slices.Sorted(maps.Keys(t.wants)) {
		t.found(name, "missing")
	}
}

// tree is the comparison of one layer. Every file is reached through the open
// directory it is in, so that no link leads out of the tree.
type tree struct {
	c      *checker
	root   *os.File
	found  func(name, format string, args ...any)
	wants  map[string]*want // by each name that was not come to yet
	inodes map[*want]inode  // which file it turned out to be
	owners map[inode]*want  // of files with several names
	buf    []byte
}

type inode struct{ dev, ino uint64 }

// children compares what is in the directory with the name dir.
func (t *tree) children(d *os.File, dir string) {
	for {
		names, err := d.Readdirnames(1000)
		for _, base := range names {
			if t.c.ctx.Err() != nil {
				return
			}
			name := path.Join(dir, base)
			if !t.entry(int(d.Fd()), base, name) {
				continue
			}
			sub, err := reach.Dir(int(d.Fd()), base)
			if err != nil {
				t.found(name, "%v", err)
				continue
			}
			t.children(sub, name)
			sub.Close()
		}
		if err == io.EOF {
			return
		}
		if err != nil {
			t.found(dir, "%v", err)
			return
		}
	}
}

// entry compares what stands at base in the open directory, and tells whether
// it is a directory that is to be compared in turn. Sockets are in no manifest.
func (t *tree) entry(dirfd int, base, name string) (descend bool) {
	var st unix.Stat_t
	if err := unix.Fstatat(dirfd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err != unix.ENOENT {
			t.found(name, "%v", err)
			delete(t.wants, name)
		}
		return false
	}
	w := t.wants[name]
	if w == nil {
		if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
			t.found(name, "not in the file manifest")
		}
		return false
	}
	delete(t.wants, name)
	t.c.files.Add(1)
	as, first := t.sameFile(w, name, inode{uint64(st.Dev), st.Ino}, uint64(st.Nlink))
	if !first {
		return false
	}
	t.attributes(w, dirfd, base, as, &st)
	return w.mode.IsDir() && st.Mode&unix.S_IFMT == unix.S_IFDIR
}

// sameFile compares hard links: the names of one entry are one file, those of
// two are two. It tells whether the file's attributes are to be compared,
// which is so once, and under which name: its first, or the one that is a file
// of its own and must not be.
func (t *tree) sameFile(w *want, name string, ino inode, links uint64) (as string, first bool) {
	if links == 1 && t.elsewhere(w, name) {
		t.found(name, "no hard link of the file's other names %q", w.names)
		return name, true
	}
	if known, ok := t.inodes[w]; ok {
		if known != ino {
			t.found(name, "no hard link of the file's other names %q", w.names)
		}
		return name, known != ino
	}
	t.inodes[w] = ino
	if links > 1 && !w.mode.IsDir() {
		if other, ok := t.owners[ino]; ok {
			t.found(name, "a hard link of %q, must be a file of its own", other.names[0])
		}
		t.owners[ino] = w
	}
	return w.names[0], true
}

// elsewhere tells whether something stands at another name of an entry.
func (t *tree) elsewhere(w *want, name string) bool {
	return slices.ContainsFunc(w.names, func(other string) bool {
		if other == name {
			return false
		}
		_, err := reach.Stat(int(t.root.Fd()), other)
		return err == nil
	})
}

func (t *tree) attributes(w *want, dirfd int, base, name string, st *unix.Stat_t) {
	got := modeOf(st)
	if got != w.mode {
		t.found(name, "mode %v, must be %v", got, w.mode)
		if got.Type() != w.mode.Type() {
			return
		}
	}
	if int64(st.Uid) != w.uid || int64(st.Gid) != w.gid {
		t.found(name, "owner %d:%d, must be %d:%d", st.Uid, st.Gid, w.uid, w.gid)
	}
	if got := st.Mtim.Nano(); got != w.mtime {
		t.found(name, "time %d ns, must be %d", got, w.mtime)
	}
	switch {
	case w.mode.IsRegular():
		t.contents(w, dirfd, base, name, st)
	case w.mode&fs.ModeSymlink != 0:
		n, err := unix.Readlinkat(dirfd, base, t.buf)
		if err != nil || string(t.buf[:n]) != w.target {
			t.found(name, "link target %q, must be %q", t.buf[:max(n, 0)], w.target)
		}
	case w.mode&fs.ModeDevice != 0 && st.Rdev != w.rdev:
		t.found(name, "device %d:%d, must be %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev), unix.Major(w.rdev), unix.Minor(w.rdev))
	}
	t.xattrs(w, dirfd, base, name)
}

func (t *tree) contents(w *want, dirfd int, base, name string, st *unix.Stat_t) {
	if st.Size != w.size {
		t.found(name, "%d bytes, must be %d", st.Size, w.size)
		return
	}
	sum, err := t.c.hash(dirfd, base)
	switch {
	case t.c.ctx.Err() != nil:
	case err != nil:
		t.found(name, "%v", err)
	case sum != w.sha:
		t.found(name, "contents sha256:%s, must be sha256:%s", sum, w.sha)
	}
}

// xattrs compares all but the notes of overlayfs that show in no mount.
func (t *tree) xattrs(w *want, dirfd int, base, name string) {
	got, err := reach.Xattrs(dirfd, base, t.buf, func(x string) bool {
		return !strings.HasPrefix(x, overlayXattrs) || slices.Contains(overlayMarks, x)
	})
	if err != nil {
		t.found(name, "xattrs: %v", err)
		return
	}
	if maps.Equal(got, w.xattrs) {
		return
	}
	all := maps.Clone(w.xattrs)
	maps.Copy(all, got)
	for _, x := range slices.Sorted(maps.Keys(all)) {
		have, there := got[x]
		must, wanted := w.xattrs[x]
		switch {
		case !wanted:
			t.found(name, "xattr %q is %q, must not be", x, have)
		case !there:
			t.found(name, "xattr %q is missing, must be %q", x, must)
		case have != must:
			t.found(name, "xattr %q is %q, must be %q", x, have, must)
		}
	}
}
