package fsck

import (
	"bufio"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/continuity/proto"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	pb "google.golang.org/protobuf/proto"

	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

// Names that the format gives a meaning (docs/FORMAT.md, "File manifest").
const (
	timeXattr   = "varve.dev/mtime"
	namesXattr  = "varve.dev/names"
	targetXattr = "varve.dev/target"

	overlayXattrs = "trusted.overlay."
)

// overlayMarks are the xattrs of overlayfs by which a mount shows other
// contents than the tree's (Documentation/filesystems/overlayfs.rst). A layer
// may have the first, and has none of the others: it was unpacked, or written
// through a mount that makes none.
var overlayMarks = []string{
	"trusted.overlay.opaque", "trusted.overlay.redirect", "trusted.overlay.metacopy", "trusted.overlay.whiteout",
}

// blockSize is what a layer's recorded size counts in.
const blockSize = 4096

// want is what a file manifest says of one inode.
type want struct {
	names  []string
	mode   fs.FileMode
	uid    int64
	gid    int64
	size   int64
	mtime  int64
	sha    string
	target string
	rdev   uint64
	xattrs map[string]string
}

// summary is what is kept of a file manifest for L3, L4 and L6.
type summary struct {
	err    error
	size   int64
	inodes int64
}

// errUnchecked means that the manifest's blob is not whole, which B1 to B3
// say.
var errUnchecked = errors.New("the blob of its file manifest is not whole")

// readManifests reads the file manifest of every layer once. Layers share them
// seldom.
func (c *checker) readManifests() {
	c.manifests = make(map[layout.LayerID]summary, len(c.rec.layers))
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(c.opts.Workers)
	for id, rec := range c.rec.layers {
		if !c.concerns(layerObject(id)) {
			continue
		}
		g.Go(func() error {
			if c.ctx.Err() != nil {
				return nil
			}
			s := c.summarize(rec)
			mu.Lock()
			defer mu.Unlock()
			c.manifests[id] = s
			return nil
		})
	}
	_ = g.Wait()
}

// layerManifest: L3.
func (c *checker) layerManifest(f found) {
	for id, s := range c.manifests {
		if s.err != nil && !errors.Is(s.err, errUnchecked) {
			f(layerObject(id), "", "file manifest %s: %v", c.rec.layers[id].Manifest, s.err)
		}
	}
}

// layerUsage: L6.
func (c *checker) layerUsage(f found) {
	for id, s := range c.manifests {
		if rec := c.rec.layers[id]; s.err == nil && (s.size != rec.Size || s.inodes != rec.Inodes) {
			f(layerObject(id), "", "recorded are %d bytes in %d inodes, the file manifest has %d in %d", rec.Size, rec.Inodes, s.size, s.inodes)
		}
	}
}

// summarize reads a layer's file manifest through, and holds it against its
// digest and against what a file manifest is: of bytes that are not the
// digest's nothing is said.
func (c *checker) summarize(rec layout.LayerRecord) (s summary) {
	d := rec.Manifest
	if blobKey(string(d)) != nil || !c.exists(layout.BlobNode(d)) {
		return summary{err: errors.New("it is not recorded")}
	}
	if !c.intact(d) {
		return summary{err: errUnchecked}
	}
	names, sum := newNameSet(rec.Inodes), sha256.New()
	read := c.readThrough(d, sum, func(w *want) error {
		s.inodes++
		switch {
		case w.mode.IsRegular():
			s.size += (w.size + blockSize - 1) / blockSize * blockSize
		case w.mode.IsDir():
			s.size += blockSize
		}
		for _, name := range w.names {
			names.add(name, w.mode.IsDir())
		}
		return nil
	})
	names.sort()
	wrong := hex.EncodeToString(sum.Sum(nil)) != d.Hex()
	switch {
	case wrong && (c.hashes(d) || errors.Is(read, fs.ErrNotExist)): // B3; removed since
		s.err = errUnchecked
	case wrong:
		s.err = errNotItsBytes
	case read != nil:
		s.err = read
	case !names.has("."):
		s.err = errors.New("it has no root directory")
	default:
		s.err = c.distinct(d, names)
	}
	return s
}

// distinct tells whether every name stands in a manifest once.
func (c *checker) distinct(d layout.BlobDigest, names *nameSet) error {
	twice := names.twice()
	if len(twice) == 0 {
		return nil
	}
	seen := map[string]bool{} // of the names whose hash is there twice
	return c.eachWant(d, func(w *want) error {
		for _, name := range w.names {
			if !twice[names.hash(name)] {
				continue
			}
			if seen[name] {
				return fmt.Errorf("%q is there for the second time", name)
			}
			seen[name] = true
		}
		return nil
	})
}

// nameSet holds the names of a file manifest in 8 bytes each.
type nameSet struct {
	seed   maphash.Seed
	hashes []uint64 // the last bit tells of a directory
}

func newNameSet(about int64) *nameSet {
	return &nameSet{maphash.MakeSeed(), make([]uint64, 0, min(max(about, 0), 1<<20))}
}

func (s *nameSet) hash(name string) uint64 { return maphash.String(s.seed, name) &^ 1 }

func (s *nameSet) add(name string, dir bool) {
	h := s.hash(name)
	if dir {
		h |= 1
	}
	s.hashes = append(s.hashes, h)
}

// sort has to come between add and the rest.
func (s *nameSet) sort() { slices.Sort(s.hashes) }

func (s *nameSet) find(name string) (there, dir bool) {
	h := s.hash(name)
	i, _ := slices.BinarySearch(s.hashes, h)
	if i == len(s.hashes) || s.hashes[i]&^1 != h {
		return false, false
	}
	return true, s.hashes[i]&1 != 0
}

func (s *nameSet) has(name string) bool {
	there, _ := s.find(name)
	return there
}

// twice are the hashes of more than one name.
func (s *nameSet) twice() map[uint64]bool {
	out := map[uint64]bool{}
	for i := 1; i < len(s.hashes); i++ {
		if h := s.hashes[i] &^ 1; h == s.hashes[i-1]&^1 {
			out[h] = true
		}
	}
	return out
}

// maxResource is more than an inode with 65,000 names needs.
const maxResource = 512 << 20

// eachWant calls fn with each entry of a file manifest whose blob is whole, with
// the same pointer every time.
func (c *checker) eachWant(d layout.BlobDigest, fn func(*want) error) error {
	return c.readThrough(d, io.Discard, fn)
}

// readThrough is eachWant for a blob that may not be: all of its bytes go to
// also, whatever they say.
func (c *checker) readThrough(d layout.BlobDigest, also io.Writer, fn func(*want) error) error {
	file, err := reach.Regular(c.fd(), layout.BlobPath(d))
	if err != nil {
		return err
	}
	defer file.Close()
	in := bufio.NewReaderSize(io.TeeReader(file, also), 64<<10)
	err = eachResource(in, func(w *want) error {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		return fn(w)
	})
	_, rest := io.Copy(io.Discard, in)
	return cmp.Or(err, rest)
}

// resourceTag begins each entry of a continuity Manifest message: its field 1,
// which is repeated.
var resourceTag = protowire.EncodeTag(1, protowire.BytesType)

func eachResource(in *bufio.Reader, fn func(*want) error) error {
	var body []byte
	var r proto.Resource
	last := ""
	for i := 0; ; i++ {
		tag, err := binary.ReadUvarint(in)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil || tag != resourceTag {
			return fmt.Errorf("entry %d: no resource", i)
		}
		size, err := binary.ReadUvarint(in)
		if err != nil || size > maxResource {
			return fmt.Errorf("entry %d: no length", i)
		}
		if body, err = readFull(in, body, int(size)); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		if err := pb.Unmarshal(body, &r); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		w, err := wantOf(&r)
		if err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		if w.names[0] <= last {
			return fmt.Errorf("entry %d: %q is out of order", i, w.names[0])
		}
		last = w.names[0]
		if err := fn(&w); err != nil {
			return err
		}
	}
}

// readFull reads into a buffer that it makes longer only for bytes that are
// there.
func readFull(in io.Reader, buf []byte, size int) ([]byte, error) {
	const piece = 1 << 20
	buf = buf[:0]
	for len(buf) < size {
		at := len(buf)
		buf = slices.Grow(buf, min(size-at, piece))[:at+min(size-at, piece)]
		if _, err := io.ReadFull(in, buf[at:]); err != nil {
			return buf, err
		}
	}
	return buf, nil
}

func wantOf(r *proto.Resource) (want, error) {
	w := want{
		names: r.Path, mode: fs.FileMode(r.Mode), uid: r.Uid, gid: r.Gid, size: int64(r.Size),
		target: r.Target, rdev: unix.Mkdev(uint32(r.Major), uint32(r.Minor)), xattrs: map[string]string{},
	}
	timed := false
	for _, x := range r.Xattr {
		switch x.Name {
		case timeXattr:
			t, err := strconv.ParseInt(string(x.Data), 10, 64)
			if err != nil {
				return w, fmt.Errorf("%q: time: %w", r.Path, err)
			}
			w.mtime, timed = t, true
		case namesXattr:
			w.names = strings.Split(string(x.Data), "\x00")
		case targetXattr:
			w.target = string(x.Data)
		default:
			w.xattrs[x.Name] = string(x.Data)
		}
	}
	if !timed {
		return w, fmt.Errorf("%q has no time", r.Path)
	}
	if w.mode.IsRegular() {
		sum := ""
		if len(r.Digest) == 1 {
			sum = r.Digest[0]
		}
		if err := blobKey(sum); err != nil {
			return w, fmt.Errorf("%q: %w", r.Path, err)
		}
		w.sha = layout.BlobDigest(sum).Hex()
	}
	return w, checkNames(w)
}

// checkNames refuses what is no name in a tree, a root that is no directory,
// and a directory with two names.
func checkNames(w want) error {
	if len(w.names) == 0 {
		return errors.New("it has no name")
	}
	for _, n := range w.names {
		if n != path.Clean(n) || !filepath.IsLocal(n) || strings.ContainsRune(n, 0) {
			return fmt.Errorf("%q is no name in a tree", n)
		}
		if n == "." && !w.mode.IsDir() || len(w.names) > 1 && w.mode.IsDir() {
			return fmt.Errorf("%q: mode %v with %d names", n, w.mode, len(w.names))
		}
	}
	return nil
}

// modeOf converts what lstat says to the manifest's terms.
func modeOf(st *unix.Stat_t) fs.FileMode {
	m := fs.FileMode(st.Mode & 0o777)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		m |= fs.ModeDir
	case unix.S_IFLNK:
		m |= fs.ModeSymlink
	case unix.S_IFIFO:
		m |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		m |= fs.ModeSocket
	case unix.S_IFCHR:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFBLK:
		m |= fs.ModeDevice
	}
	if st.Mode&unix.S_ISUID != 0 {
		m |= fs.ModeSetuid
	}
	if st.Mode&unix.S_ISGID != 0 {
		m |= fs.ModeSetgid
	}
	if st.Mode&unix.S_ISVTX != 0 {
		m |= fs.ModeSticky
	}
	return m
}
