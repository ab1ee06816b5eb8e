package fsck

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"varve.dev/layout"
)

// deepChecks: B3 for every blob, L4 for every layer, in parallel.
func (c *check) deepChecks() {
	g, ctx := errgroup.WithContext(c.ctx)
	g.SetLimit(c.opts.Workers)
	total := c.deepTotal()
	var done, files atomic.Int64
	read := func(n int64) {
		now := done.Add(n)
		if c.opts.Progress != nil {
			c.opts.Progress(now, total)
		}
	}
	for d := range c.rec.blobs {
		g.Go(func() error {
			if ctx.Err() == nil {
				c.deepBlob(d, read)
			}
			return ctx.Err()
		})
	}
	for id, rec := range c.rec.layers {
		g.Go(func() error {
			if ctx.Err() == nil {
				(&treeCheck{c: c, object: "layer " + string(id), dir: c.path(path.Join(layout.LayerPath(id), layout.TreeDir)), read: read, files: &files}).run(rec)
			}
			return ctx.Err()
		})
	}
	_ = g.Wait() // the context's end is Run's to report
	c.report.Bytes, c.report.Files = done.Load(), files.Load()
}

func (c *check) deepTotal() (total int64) {
	for _, b := range c.rec.blobs {
		total += b.Size
	}
	for _, l := range c.rec.layers {
		total += l.Size
	}
	return total
}

// deepBlob: B3. A missing or short file has been reported.
func (c *check) deepBlob(d layout.BlobDigest, read func(int64)) {
	rel := layout.BlobPath(d)
	sum, _, err := hashFile(c.path(rel), read)
	if os.IsNotExist(err) {
		return
	}
	if err != nil {
		c.found("B3", "blob "+string(d), rel, "%v", err)
	} else if sum != d.Hex() {
		c.found("B3", "blob "+string(d), rel, "the bytes have the digest sha256:%s", sum)
	}
}

// hashFile reads a regular file without following a link to it.
func hashFile(name string, read func(int64)) (sum string, size int64, err error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOATIME, 0)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	buf := make([]byte, 256<<10)
	for {
		n, err := f.Read(buf)
		h.Write(buf[:n])
		size += int64(n)
		read(int64(n))
		if err == io.EOF {
			return hex.EncodeToString(h.Sum(nil)), size, nil
		}
		if err != nil {
			return "", size, err
		}
	}
}

// treeCheck compares one layer's tree with its file manifest (L4).
type treeCheck struct {
	c      *check
	object string
	dir    string
	read   func(int64)
	files  *atomic.Int64
	wants  map[string]*want // by each name
}

func (t *treeCheck) run(rec layout.LayerRecord) {
	wants, err := t.c.manifest(rec.Manifest)
	if err != nil {
		return // L3 said so
	}
	t.wants = map[string]*want{}
	for i := range wants {
		for _, n := range wants[i].names {
			t.wants[n] = &wants[i]
		}
		t.entry(&wants[i])
	}
	t.extra(".")
}

func (t *treeCheck) found(name, format string, args ...any) {
	t.c.found("L4", t.object, name, format, args...)
}

// entry checks one inode of the manifest, all its names included.
func (t *treeCheck) entry(w *want) {
	var first unix.Stat_t
	for i, name := range w.names {
		t.files.Add(1)
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(t.dir, name), &st); err != nil {
			t.found(name, "missing (%v)", err)
			if i == 0 {
				return
			}
			continue
		}
		if i == 0 {
			first = st
		} else if st.Ino != first.Ino {
			t.found(name, "no hard link of %q any more", w.names[0])
		}
	}
	t.attributes(w, &first)
}

func (t *treeCheck) attributes(w *want, st *unix.Stat_t) {
	name := w.names[0]
	if got := modeOf(st); got != w.mode {
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
	full := filepath.Join(t.dir, name)
	switch {
	case w.mode.IsRegular():
		t.contents(w, st, full)
	case w.mode&fs.ModeSymlink != 0:
		if got, err := os.Readlink(full); err != nil || got != w.target {
			t.found(name, "link target %q, must be %q", got, w.target)
		}
	case w.mode&fs.ModeDevice != 0:
		if got := uint64(unix.Mkdev(uint32(w.major), uint32(w.minor))); got != st.Rdev {
			t.found(name, "device %d:%d, must be %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev), w.major, w.minor)
		}
	}
	t.xattrs(w, full)
}

func (t *treeCheck) contents(w *want, st *unix.Stat_t, full string) {
	if st.Size != w.size {
		t.found(w.names[0], "%d bytes, must be %d", st.Size, w.size)
		return
	}
	sum, _, err := hashFile(full, t.read)
	if err != nil {
		t.found(w.names[0], "%v", err)
	} else if sum != w.sha {
		t.found(w.names[0], "contents sha256:%s, must be sha256:%s", sum, w.sha)
	}
}

// xattrs compares all but what overlayfs notes for itself.
func (t *treeCheck) xattrs(w *want, full string) {
	got, err := listXattrs(full)
	if err != nil {
		t.found(w.names[0], "xattrs: %v", err)
		return
	}
	if maps.Equal(got, w.xattrs) {
		return
	}
	names := map[string]bool{}
	for n := range got {
		names[n] = true
	}
	for n := range w.xattrs {
		names[n] = true
	}
	for _, n := range slices.Sorted(maps.Keys(names)) {
		have, there := got[n]
		must, wanted := w.xattrs[n]
		if have != must || there != wanted {
			t.found(w.names[0], "xattr %s is %q (there: %t), must be %q (there: %t)", n, have, there, must, wanted)
		}
	}
}

func listXattrs(full string) (map[string]string, error) {
	out := map[string]string{}
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(full, list)
	if err == unix.ENOTSUP {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	value := make([]byte, 64<<10)
	for name := range strings.SplitSeq(string(list[:n]), "\x00") {
		if name == "" || strings.HasPrefix(name, overlayXattrs) && name != opaqueXattr {
			continue
		}
		k, err := unix.Lgetxattr(full, name, value)
		if err != nil {
			return nil, err
		}
		out[name] = string(value[:k])
	}
	return out, nil
}

// extra reports what is in the tree and not in the manifest. Sockets are in no
// manifest.
func (t *treeCheck) extra(name string) {
	entries, err := os.ReadDir(filepath.Join(t.dir, name))
	if err != nil {
		return // reported as missing or of the wrong type
	}
	for _, e := range entries {
		child := path.Join(name, e.Name())
		if t.wants[child] == nil {
			if e.Type() != fs.ModeSocket {
				t.found(child, "not in the file manifest")
			}
			continue
		}
		if e.IsDir() {
			t.extra(child)
		}
	}
}
