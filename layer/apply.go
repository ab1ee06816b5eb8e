package layer

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Names with a meaning in a layer's stream (OCI image-spec, layer.md,
// "Whiteouts").
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
	auFSPrefix     = ".wh..wh." // what aufs kept for itself; not part of the layer
)

// Xattrs with a meaning to overlayfs.
const (
	opaqueXattr   = "trusted.overlay.opaque"
	overlayXattrs = "trusted.overlay."
	userXattrs    = "user.overlay."
	paxXattr      = "SCHILY.xattr." // prefix of an xattr's PAX record
)

// rootAttr is what a layer's own root directory looks like. Streams list it
// or not, and with what the packer's directory happened to have; containerd
// takes no notice either.
var rootAttr = durable.Attr{Mode: 0o755}

// Applied is a stream that was unpacked.
type Applied struct {
	DiffID layout.DiffID
	Size   int64 // bytes of the uncompressed stream

	tree    *durable.Tree
	sums    map[uint64]string // inode → sha256 of its contents, in hex
	implied []string
	links   []link
	times   []dirTime // of listed directories
}

// link is a hard link whose target is not in the layer.
type link struct{ name, target string }

// Unresolved tells whether the tree still lacks something of its parents, and
// so can stand on those parents only.
func (a *Applied) Unresolved() bool { return len(a.implied) > 0 || len(a.links) > 0 }

// Apply unpacks an uncompressed tar stream into tree, to its very end: the
// DiffID covers what follows the archive too. Files go to the tree's barrier.
//
// room, which may be nil, is asked before anything that takes space is made, for
// as many bytes as layout.LayerRecord.Size counts for it; its error ends the
// unpacking.
//
// After an error the tree holds part of the layer. Kinds: ErrInvalidArgument
// for a stream that is no layer, naming the entry; ErrResourceExhausted for a
// full disk; others as they come from r and room.
func Apply(ctx context.Context, r io.Reader, tree *durable.Tree, room func(bytes int64) error) (*Applied, error) {
	if room == nil {
		room = func(int64) error { return nil }
	}
	sum := newStreamSum(r)
	defer sum.stop()
	a := &applier{
		ctx: ctx, tree: tree, room: room, tar: tar.NewReader(sum), buf: make([]byte, copyBuffer),
		fresh: map[string]bool{}, hash: sha256.New(),
		out: &Applied{tree: tree, sums: map[uint64]string{}},
	}
	if err := a.entries(); err != nil {
		return nil, err
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, sum, a.buf); err != nil {
		return nil, fmt.Errorf("after the layer's last entry: %w", err)
	}
	if err := a.finish(); err != nil {
		return nil, err
	}
	a.out.DiffID, a.out.Size = sum.result()
	return a.out, nil
}

// copyBuffer is how much of a file is in memory at once.
const copyBuffer = 128 << 10

// applier is one Apply.
type applier struct {
	ctx    context.Context
	tree   *durable.Tree
	room   func(bytes int64) error
	tar    *tar.Reader
	buf    []byte
	hash   hash.Hash
	out    *Applied
	times  []dirTime       // set when nothing goes into directories any more
	fresh  map[string]bool // names this layer brought, so that its whiteouts spare them
	opaque []string        // directories to make opaque
}

type dirTime struct {
	name  string
	mtime int64
}

func (a *applier) entries() error {
	for {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		hdr, err := a.tar.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return streamError("the layer's tar stream", err)
		}
		if err := a.entry(hdr); err != nil {
			return fmt.Errorf("layer entry %q: %w", hdr.Name, err)
		}
	}
}

// streamError gives a broken archive its kind; an error of the source below
// has one already.
func streamError(what string, err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrFieldTooLong) {
		return fmt.Errorf("%s is damaged or cut short: %w: %w", what, err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// cleanName gives a name in the tree, "." for the root itself.
func cleanName(name string) (string, error) {
	clean := path.Clean(strings.TrimLeft(name, "/"))
	if clean == ".." || strings.HasPrefix(clean, "../") {
		return "", fmt.Errorf("leads out of the layer's root: %w", errdefs.ErrInvalidArgument)
	}
	if strings.ContainsRune(clean, 0) {
		return "", fmt.Errorf("has a NUL in its name: %w", errdefs.ErrInvalidArgument)
	}
	return clean, nil
}

func (a *applier) entry(hdr *tar.Header) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(hdr.Name)
	if err != nil || name == "." {
		return err
	}
	base := path.Base(name)
	switch {
	case base == opaqueName:
		return a.makeOpaque(path.Dir(name))
	case strings.HasPrefix(base, auFSPrefix):
		return nil
	case strings.HasPrefix(base, whiteoutPrefix):
		return a.whiteout(path.Join(path.Dir(name), base[len(whiteoutPrefix):]), base, hdr)
	}
	a.fresh[name] = true
	if err := a.makeRoom(name, hdr.Typeflag == tar.TypeDir); err != nil {
		return err
	}
	return a.create(name, hdr)
}

// makeOpaque hides what lower layers have in a directory.
func (a *applier) makeOpaque(dir string) error {
	if dir == "." {
		// Everything below goes. The root of an overlay cannot be
		// opaque by an xattr of its own upper directory alone, but the
		// kernel honours it on a lower layer's root.
		return a.tree.SetXattr(".", opaqueXattr, "y")
	}
	a.opaque = append(a.opaque, dir)
	return nil
}

// whiteout hides a file of a lower layer, unless this layer has one there.
func (a *applier) whiteout(name, base string, hdr *tar.Header) error {
	if len(base) == len(whiteoutPrefix) || path.Base(name) == "." || path.Base(name) == ".." {
		return fmt.Errorf("is a whiteout of nothing: %w", errdefs.ErrInvalidArgument)
	}
	st, there, err := a.tree.Lstat(name)
	if err != nil {
		return err
	}
	if there {
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			a.opaque = append(a.opaque, name)
		}
		return nil
	}
	return a.tree.Node(name, unix.S_IFCHR, 0, durable.Attr{UID: hdr.Uid, GID: hdr.Gid, MTime: hdr.ModTime.UnixNano()})
}

// makeRoom removes what an earlier entry put at name; a directory that is
// listed again stays.
func (a *applier) makeRoom(name string, dir bool) error {
	st, there, err := a.tree.Lstat(name)
	if err != nil || !there {
		return err
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if isDir && dir {
		return nil
	}
	if dir && isWhiteout(&st) {
		a.opaque = append(a.opaque, name)
	}
	return a.tree.Remove(name)
}

// isWhiteout tells a whiteout in overlayfs's form.
func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

func (a *applier) create(name string, hdr *tar.Header) error {
	attr := attrOf(hdr)
	switch hdr.Typeflag {
	case tar.TypeDir:
		if err := a.room(layout.DirSize); err != nil {
			return err
		}
		a.times = append(a.times, dirTime{name, attr.MTime})
		return a.tree.Mkdir(name, attr)
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		return a.file(name, attr, hdr)
	case tar.TypeSymlink:
		return a.tree.Symlink(name, hdr.Linkname, attr)
	case tar.TypeLink:
		return a.link(name, hdr.Linkname)
	case tar.TypeChar:
		return a.tree.Node(name, unix.S_IFCHR, unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor)), attr)
	case tar.TypeBlock:
		return a.tree.Node(name, unix.S_IFBLK, unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor)), attr)
	case tar.TypeFifo:
		return a.tree.Node(name, unix.S_IFIFO, 0, attr)
	}
	return fmt.Errorf("has the unknown type %q: %w", hdr.Typeflag, errdefs.ErrInvalidArgument)
}

func (a *applier) file(name string, attr durable.Attr, hdr *tar.Header) error {
	if err := a.room(layout.OnDisk(hdr.Size)); err != nil {
		return err
	}
	a.hash.Reset()
	body := &hashingReader{r: a.tar, hash: a.hash}
	ino, size, err := a.tree.File(name, attr, body, isSparse(hdr), a.buf)
	if err != nil {
		if body.err != nil {
			return streamError("its contents", body.err)
		}
		return err
	}
	if size != hdr.Size {
		return fmt.Errorf("has %d bytes, %d were announced: %w", size, hdr.Size, errdefs.ErrInvalidArgument)
	}
	a.out.sums[ino] = hex.EncodeToString(a.hash.Sum(nil))
	return nil
}

// hashingReader hashes what goes through it and remembers why it ended.
type hashingReader struct {
	r    io.Reader
	hash hash.Hash
	err  error
}

func (h *hashingReader) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	h.hash.Write(p[:n])
	if err != nil && err != io.EOF {
		h.err = err
	}
	return n, err
}

// link makes a hard link, or leaves it for Resolve.
func (a *applier) link(name, target string) error {
	clean, err := cleanName(target)
	if err != nil {
		return fmt.Errorf("its link target %q: %w", target, err)
	}
	st, there, err := a.tree.Lstat(clean)
	if err != nil {
		return err
	}
	if !there || isWhiteout(&st) {
		// In a lower layer; there this layer may take the name away and
		// keep the file under the new one.
		a.out.links = append(a.out.links, link{name, clean})
		return nil
	}
	return a.tree.Link(name, clean)
}

// finish does what has to wait until everything is in place.
func (a *applier) finish() error {
	for _, dir := range a.opaque {
		st, there, err := a.tree.Lstat(dir)
		if err != nil {
			return err
		}
		if !there {
			// Opaque, and nothing of its own in it: the directory is
			// implied like any other.
			if err := a.tree.Ensure(dir); err != nil {
				return err
			}
		} else if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue // a later entry put something else there
		}
		if err := a.tree.SetXattr(dir, opaqueXattr, "y"); err != nil {
			return err
		}
	}
	a.out.times = a.times
	if err := a.out.setTimes(); err != nil {
		return err
	}
	a.out.implied = a.stillImplied()
	return a.tree.SetDir(".", rootAttr)
}

// setTimes gives listed directories their times, after anything was put into
// them.
func (a *Applied) setTimes() error {
	for _, d := range a.times {
		st, there, err := a.tree.Lstat(d.name)
		if err != nil {
			return err
		}
		if there && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			if err := a.tree.SetTime(d.name, d.mtime); err != nil {
				return err
			}
		}
	}
	return nil
}

// stillImplied leaves out directories that the stream listed after all.
func (a *applier) stillImplied() []string {
	var out []string
	for _, dir := range a.tree.Implied() {
		if a.fresh[dir] {
			continue
		}
		if st, there, err := a.tree.Lstat(dir); err == nil && there && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			out = append(out, dir)
		}
	}
	return out
}

// attrOf takes a header's attributes over. Times before 1970 are kept.
func attrOf(hdr *tar.Header) durable.Attr {
	a := durable.Attr{
		Mode: uint32(hdr.Mode) & 0o7777,
		UID:  hdr.Uid, GID: hdr.Gid,
		MTime: hdr.ModTime.UnixNano(),
	}
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok || strings.HasPrefix(name, overlayXattrs) || strings.HasPrefix(name, userXattrs) {
			continue
		}
		if a.Xattrs == nil {
			a.Xattrs = map[string]string{}
		}
		a.Xattrs[name] = value
	}
	return a
}

// isSparse tells whether the archive says that the file has holes.
func isSparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	_, old := hdr.PAXRecords["GNU.sparse.map"]
	_, major := hdr.PAXRecords["GNU.sparse.major"]
	return old || major
}
