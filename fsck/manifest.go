package fsck

import (
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/continuity/proto"
	"golang.org/x/sys/unix"
	pb "google.golang.org/protobuf/proto"

	"varve.dev/layout"
)

// Names that the format gives a meaning (docs/FORMAT.md, "File manifest").
const (
	timeXattr   = "varve.dev/mtime"
	namesXattr  = "varve.dev/names"
	targetXattr = "varve.dev/target"

	overlayXattrs = "trusted.overlay."
	opaqueXattr   = "trusted.overlay.opaque"
)

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
	major  uint64
	minor  uint64
	xattrs map[string]string
}

// manifestChecks: L3, L6.
func (c *check) manifestChecks() {
	for id, rec := range c.rec.layers {
		object := "layer " + string(id)
		wants, err := c.manifest(rec.Manifest)
		if err != nil {
			c.found("L3", object, layout.BlobPath(rec.Manifest), "%v", err)
			continue
		}
		var size int64
		for _, w := range wants {
			switch {
			case w.mode.IsRegular():
				size += (w.size + blockSize - 1) / blockSize * blockSize
			case w.mode.IsDir():
				size += blockSize
			}
		}
		if size != rec.Size || int64(len(wants)) != rec.Inodes {
			c.found("L6", object, "", "recorded are %d bytes in %d inodes, the file manifest has %d in %d", rec.Size, rec.Inodes, size, len(wants))
		}
	}
}

// manifest reads a file manifest.
func (c *check) manifest(d layout.BlobDigest) ([]want, error) {
	if _, ok := c.rec.blobs[d]; !ok {
		return nil, fmt.Errorf("its file manifest %s is not recorded", d)
	}
	data, err := os.ReadFile(c.path(layout.BlobPath(d)))
	if err != nil {
		return nil, err
	}
	var m proto.Manifest
	if err := pb.Unmarshal(data, &m); err != nil {
		return nil, err
	}
	out := make([]want, 0, len(m.Resource))
	for _, r := range m.Resource {
		w, err := wantOf(r)
		if err != nil {
			return nil, err
		}
		out = append(out, w)
	}
	return out, nil
}

func wantOf(r *proto.Resource) (want, error) {
	w := want{
		names: r.Path, mode: fs.FileMode(r.Mode), uid: r.Uid, gid: r.Gid, size: int64(r.Size),
		target: r.Target, major: r.Major, minor: r.Minor, xattrs: map[string]string{},
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
	if !timed || len(w.names) == 0 {
		return w, fmt.Errorf("an entry %q without name or time", r.Path)
	}
	if w.mode.IsRegular() {
		if len(r.Digest) != 1 {
			return w, fmt.Errorf("%q has %d digests", r.Path, len(r.Digest))
		}
		w.sha = strings.TrimPrefix(r.Digest[0], "sha256:")
	}
	return w, nil
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
