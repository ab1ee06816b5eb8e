package fsck

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/continuity/proto"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	pb "google.golang.org/protobuf/proto"

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

// summary is what is kept of a file manifest for L3 and L6.
type summary struct {
	err    error
	size   int64
	inodes int64
}

// errUnchecked means that the manifest's blob is not whole, which B1 to B3
// say.
var errUnchecked = errors.New("the blob of its file manifest is not whole")

// readManifests reads every file manifest once. Layers share them seldom.
func (c *checker) readManifests() {
	c.manifests = make(map[layout.LayerID]summary, len(c.rec.layers))
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(c.opts.Workers)
	for id, rec := range c.rec.layers {
		g.Go(func() error {
			if c.ctx.Err() != nil {
				return nil
			}
			wants, err := c.manifest(rec.Manifest)
			s := summary{err: err, inodes: int64(len(wants))}
			for _, w := range wants {
				switch {
				case w.mode.IsRegular():
					s.size += (w.size + blockSize - 1) / blockSize * blockSize
				case w.mode.IsDir():
					s.size += blockSize
				}
			}
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

// maxManifest is more than a layer of ten million files needs.
const maxManifest = 4 << 30

// manifest reads a file manifest: a continuity Manifest message, field 1 of
// which is repeated.
func (c *checker) manifest(d layout.BlobDigest) ([]want, error) {
	if blobKey(string(d)) != nil || !c.exists(layout.BlobNode(d)) {
		return nil, errors.New("it is not recorded")
	}
	if !c.intact(d) {
		return nil, errUnchecked
	}
	data, err := c.readBlob(d, maxManifest)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNotItsBytes) && c.opts.Level == layout.Deep {
		return nil, errUnchecked
	}
	if err != nil {
		return nil, err
	}
	return decodeManifest(data)
}

func decodeManifest(data []byte) (out []want, err error) {
	seen := map[string]bool{}
	for last := ""; len(data) > 0; last = out[len(out)-1].names[0] {
		field, kind, n := protowire.ConsumeTag(data)
		if n < 0 || field != 1 || kind != protowire.BytesType {
			return nil, fmt.Errorf("entry %d: no resource", len(out))
		}
		body, m := protowire.ConsumeBytes(data[n:])
		if m < 0 {
			return nil, fmt.Errorf("entry %d: %w", len(out), protowire.ParseError(m))
		}
		data = data[n+m:]
		var r proto.Resource
		if err := pb.Unmarshal(body, &r); err != nil {
			return nil, fmt.Errorf("entry %d: %w", len(out), err)
		}
		w, err := wantOf(&r)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", len(out), err)
		}
		if w.names[0] <= last {
			return nil, fmt.Errorf("entry %d: %q is out of order", len(out), w.names[0])
		}
		for _, name := range w.names {
			if seen[name] {
				return nil, fmt.Errorf("entry %d: %q for the second time", len(out), name)
			}
			seen[name] = true
		}
		out = append(out, w)
	}
	if !seen["."] {
		return nil, errors.New("it has no root directory")
	}
	return out, nil
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
