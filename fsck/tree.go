package fsck

import (
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

// layerTree: L4. Manifests are read one after the other; their entries are
// compared by all workers, a piece each.
func (c *checker) layerTree(f found) {
	pieces := make(chan piece)
	var workers sync.WaitGroup
	for range c.opts.Workers {
		workers.Go(func() {
			h := newHand(c)
			defer h.leave()
			for p := range pieces {
				h.compare(p)
				p.tree.done()
			}
		})
	}
	for _, id := range c.layers.list {
		if c.ctx.Err() == nil {
			c.compareTree(id, f, pieces)
		}
	}
	close(pieces)
	workers.Wait()
}

// compareTree hands out a layer's file manifest in pieces. Without that, or
// without the tree, L1 or L3 has said so.
func (c *checker) compareTree(id layout.LayerID, f found, pieces chan<- piece) {
	if c.manifests[id].err != nil || !c.isDir(treePath(id)) {
		c.mark.skip(layerObject(id))
		c.layers.done(c, id)
		return
	}
	root, err := reach.Dir(c.fd(), treePath(id))
	if err != nil {
		f(layerObject(id), ".", "%v", err)
		c.layers.done(c, id)
		return
	}
	t := &tree{
		id:    id,
		found: func(name, format string, args ...any) { f(layerObject(id), name, format, args...) },
		end:   func() { root.Close(); c.layers.done(c, id) },
		root:  root, left: 1, shared: map[inode]string{},
	}
	defer t.done()
	names := newNameSet(c.rec.layers[id].Inodes)
	p := piece{tree: t}
	size := int64(0)
	hand := func() {
		t.begin()
		pieces <- p
		p, size = piece{tree: t}, 0
	}
	err = c.eachWant(c.rec.layers[id].Manifest, func(w *want) error {
		for _, name := range w.names {
			names.add(name, w.mode.IsDir())
		}
		p.wants = append(p.wants, *w)
		if size += w.size; len(p.wants) == pieceEntries || size > pieceBytes {
			hand()
		}
		return nil
	})
	if len(p.wants) > 0 {
		hand()
	}
	if err != nil { // it has changed since it was read, or ctx is over
		if c.ctx.Err() == nil {
			t.found("", "its file manifest cannot be read: %v", err)
		}
		return
	}
	names.sort()
	p.names = names
	hand()
}

// A piece is so many entries of one layer, or fewer with so many bytes.
const (
	pieceEntries = 64
	pieceBytes   = 4 << 20
)

// piece is a part of the comparison of one layer: entries that have to be
// there, or the names beside which nothing may be.
type piece struct {
	tree  *tree
	wants []want
	names *nameSet
}

// tree is the comparison of one layer.
type tree struct {
	id    layout.LayerID
	found func(name, format string, args ...any)
	end   func() // when all pieces are done
	root  *os.File

	mu     sync.Mutex
	left   int              // pieces to be done, and one until all are handed out
	shared map[inode]string // files with more names than their entry has, by one of these
}

type inode struct{ dev, ino uint64 }

func (t *tree) begin() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.left++
}

func (t *tree) done() {
	t.mu.Lock()
	t.left--
	last := t.left == 0
	t.mu.Unlock()
	if last {
		t.end()
	}
}

// share notes that a file belongs to an entry, and returns the name of one that
// it belongs to as well.
func (t *tree) share(ino inode, name string) (other string, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	other, ok = t.shared[ino]
	t.shared[ino] = name
	return other, ok
}

// hand is a worker. Every file is reached through the open directory it is in,
// so that no link leads out of the tree.
type hand struct {
	c      *checker
	reader *reach.Reader
	xattrs []byte

	// The directory that was used last: entries come by name.
	tree *tree
	name string
	dir  *os.File
}

func newHand(c *checker) *hand {
	return &hand{c: c, reader: reach.NewReader(), xattrs: make([]byte, reach.XattrSpace)}
}

func (h *hand) compare(p piece) {
	for i := range p.wants {
		if h.c.ctx.Err() != nil {
			break
		}
		h.entry(p.tree, &p.wants[i])
	}
	if p.names != nil {
		h.extra(p.tree, p.names, p.tree.root, ".")
	}
	h.leave() // before the tree's own directory is closed
}

// parent returns the open directory that a name stands in.
func (h *hand) parent(t *tree, name string) (int, error) {
	dir := path.Dir(name)
	if dir == "." {
		return int(t.root.Fd()), nil
	}
	if h.dir == nil || h.tree != t || h.name != dir {
		h.leave()
		d, err := reach.Dir(int(t.root.Fd()), dir)
		if err != nil {
			return -1, err
		}
		h.tree, h.name, h.dir = t, dir, d
	}
	return int(h.dir.Fd()), nil
}

func (h *hand) leave() {
	if h.dir != nil {
		h.dir.Close()
		h.dir = nil
	}
}

// stood is what stands at one name of an entry.
type stood struct {
	name string
	stat unix.Stat_t
}

func (s *stood) inode() inode { return inode{uint64(s.stat.Dev), s.stat.Ino} }

// entry compares what stands at the names of one.
func (h *hand) entry(t *tree, w *want) {
	at := make([]stood, 0, len(w.names))
	for _, name := range w.names {
		s := stood{name: name}
		dir, err := h.parent(t, name)
		if err == nil {
			err = unix.Fstatat(dir, path.Base(name), &s.stat, unix.AT_SYMLINK_NOFOLLOW)
		}
		switch {
		case reach.Missing(err):
			t.found(name, "missing")
		case err != nil:
			t.found(name, "%v", err)
		default:
			at = append(at, s)
		}
	}
	h.c.files.Add(int64(len(at)))
	h.links(t, w, at)
}

// links compares hard links: the names of one entry are one file, those of two
// are two. Attributes are compared once, under the entry's first name, and of
// each file that should not be one of its own.
func (h *hand) links(t *tree, w *want, at []stood) {
	var file *stood
	names := uint64(0)
	for i := range at {
		s := &at[i]
		alone := s.stat.Nlink == 1 && len(at) > 1
		if !alone && file == nil {
			file = s
		}
		if !alone && file.inode() == s.inode() {
			names++
			continue
		}
		t.found(s.name, "no hard link of the file's other names %q", w.names)
		h.attributes(t, w, s, s.name)
	}
	if file == nil {
		return
	}
	if file.stat.Nlink > names && !w.mode.IsDir() {
		if other, ok := t.share(file.inode(), file.name); ok { // whichever came first
			t.found(max(file.name, other), "a hard link of %q, must be a file of its own", min(file.name, other))
		}
	}
	h.attributes(t, w, file, w.names[0])
}

// extra reports what stands in a directory and in no manifest. Sockets never do.
func (h *hand) extra(t *tree, names *nameSet, d *os.File, dir string) {
	for h.c.ctx.Err() == nil {
		list, err := d.ReadDir(1000)
		for _, e := range list {
			name := path.Join(dir, e.Name())
			there, isDir := names.find(name)
			switch {
			case !there && e.Type() != fs.ModeSocket:
				t.found(name, "not in the file manifest")
			case !there || !isDir || !e.IsDir():
			default:
				sub, err := reach.Dir(int(d.Fd()), e.Name())
				if err != nil {
					t.found(name, "%v", err)
					continue
				}
				h.extra(t, names, sub, name)
				sub.Close()
			}
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

// attributes compares what stands at a name, and says so of the name as.
func (h *hand) attributes(t *tree, w *want, s *stood, as string) {
	name, base, st := as, path.Base(s.name), &s.stat
	dirfd, err := h.parent(t, s.name)
	if err != nil {
		t.found(name, "%v", err)
		return
	}
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
		h.contents(t, w, dirfd, base, name, st)
	case w.mode&fs.ModeSymlink != 0:
		n, err := unix.Readlinkat(dirfd, base, h.xattrs)
		if err != nil || string(h.xattrs[:n]) != w.target {
			t.found(name, "link target %q, must be %q", h.xattrs[:max(n, 0)], w.target)
		}
	case w.mode&fs.ModeDevice != 0 && st.Rdev != w.rdev:
		t.found(name, "device %d:%d, must be %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev), unix.Major(w.rdev), unix.Minor(w.rdev))
	}
	h.compareXattrs(t, w, dirfd, base, name)
}

func (h *hand) contents(t *tree, w *want, dirfd int, base, name string, st *unix.Stat_t) {
	if st.Size != w.size {
		t.found(name, "%d bytes, must be %d", st.Size, w.size)
		return
	}
	if !h.c.drawn(string(t.id) + "/" + w.names[0]) {
		return
	}
	sum, err := h.c.hash(h.reader, dirfd, base)
	switch {
	case h.c.ctx.Err() != nil:
	case sum != "" && sum != w.sha:
		t.found(name, "contents sha256:%s, must be sha256:%s", sum, w.sha)
	case err != nil:
		t.found(name, "%v", err)
	}
}

// compareXattrs compares all but the notes of overlayfs that show in no mount.
func (h *hand) compareXattrs(t *tree, w *want, dirfd int, base, name string) {
	got, err := reach.Xattrs(dirfd, base, h.xattrs, func(x string) bool {
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
