package layer

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/containerd/continuity/proto"
	"golang.org/x/sys/unix"
	pb "google.golang.org/protobuf/proto"

	"varve.dev/errdefs"
)

// Entry is one file of a layer's tree: an inode with all its names.
type Entry struct {
	Names  []string // in order; several are hard links of one another
	Mode   uint32   // as stat's st_mode, type included
	UID    uint32
	GID    uint32
	MTime  int64             // nanoseconds since 1970
	Size   int64             // regular files only
	SHA256 string            // hex; regular files only
	Target string            // symbolic links only
	Rdev   uint64            // device nodes only
	Xattrs map[string]string // overlayfs's own but for opaque left out
}

// Manifest says what a tree holds, its root directory (name ".") included.
// Entries are in the order of their first names.
type Manifest struct{ Entries []Entry }

// Xattrs that carry what continuity's format has no field for. No real xattr
// is called like these: Linux has only the namespaces user, trusted, security
// and system.
const (
	mtimeXattr = "varve.dev/mtime" // nanoseconds since 1970, decimal
	// The format's strings are UTF-8, file names are bytes. Where the two
	// differ, the fields hold a quoted form for people, and these the bytes.
	namesXattr  = "varve.dev/names" // separated by NUL
	targetXattr = "varve.dev/target"
)

// blockSize is what the space of a file is rounded to.
const blockSize = 4096

// Usage returns the disk space of the tree: blocks of regular files and one
// for each directory, and the number of inodes.
func (m *Manifest) Usage() (size, inodes int64) {
	for _, e := range m.Entries {
		switch e.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			size += (e.Size + blockSize - 1) / blockSize * blockSize
		case unix.S_IFDIR:
			size += blockSize
		}
	}
	return size, int64(len(m.Entries))
}

// Lookup returns the entry with a name.
func (m *Manifest) Lookup(name string) (*Entry, bool) {
	i, found := slices.BinarySearchFunc(m.Entries, name, func(e Entry, name string) int {
		return strings.Compare(e.Names[0], name)
	})
	if found {
		return &m.Entries[i], true
	}
	for i := range m.Entries {
		if e := &m.Entries[i]; len(e.Names) > 1 && slices.Contains(e.Names, name) {
			return e, true
		}
	}
	return nil, false
}

// IsWhiteout tells whether the entry hides what lower layers have there.
func (e *Entry) IsWhiteout() bool { return e.Mode&unix.S_IFMT == unix.S_IFCHR && e.Rdev == 0 }

// IsOpaque tells whether the directory hides what lower layers have in it.
func (e *Entry) IsOpaque() bool { return e.Xattrs[opaqueXattr] == "y" }

// resourceTag begins each resource in the encoding of a continuity Manifest:
// field 1, length-delimited.
const resourceTag = 1<<3 | 2

// Encode writes the manifest: a continuity Manifest message, one resource
// after the other, so that neither side needs all of it in memory.
func (m *Manifest) Encode(w io.Writer) error {
	bw := bufio.NewWriter(w)
	for i := range m.Entries {
		data, err := pb.MarshalOptions{Deterministic: true}.Marshal(m.Entries[i].resource())
		if err != nil {
			return fmt.Errorf("file manifest: %q: %w: %w", m.Entries[i].Names, err, errdefs.ErrInvalidArgument)
		}
		head := binary.AppendUvarint([]byte{resourceTag}, uint64(len(data)))
		if _, err := bw.Write(append(head, data...)); err != nil {
			return err
		}
	}
	return bw.Flush()
}

// maxResource bounds one encoded entry: names and xattrs of one file.
const maxResource = 16 << 20

// Decode reads a manifest. Errors are of kind ErrDataLoss.
func Decode(r io.Reader) (*Manifest, error) {
	m := &Manifest{}
	br := bufio.NewReader(r)
	for {
		tag, err := br.ReadByte()
		if errors.Is(err, io.EOF) {
			return m, nil
		}
		if err == nil && tag != resourceTag {
			err = fmt.Errorf("unknown field %#x", tag)
		}
		var e Entry
		if err == nil {
			e, err = decodeResource(br)
		}
		if err == nil && len(m.Entries) > 0 && m.Entries[len(m.Entries)-1].Names[0] >= e.Names[0] {
			err = fmt.Errorf("%q is out of order", e.Names[0])
		}
		if err != nil {
			return nil, fmt.Errorf("file manifest, entry %d: %w: %w", len(m.Entries), err, errdefs.ErrDataLoss)
		}
		m.Entries = append(m.Entries, e)
	}
}

func decodeResource(br *bufio.Reader) (Entry, error) {
	n, err := binary.ReadUvarint(br)
	if err != nil {
		return Entry{}, err
	}
	if n > maxResource {
		return Entry{}, fmt.Errorf("%d bytes long", n)
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(br, data); err != nil {
		return Entry{}, err
	}
	var res proto.Resource
	if err := pb.Unmarshal(data, &res); err != nil {
		return Entry{}, err
	}
	return entryOf(&res)
}

// resource converts to continuity's form, whose mode is that of package os.
func (e *Entry) resource() *proto.Resource {
	res := &proto.Resource{
		Uid: int64(e.UID), Gid: int64(e.GID),
		Mode: uint32(fileMode(e.Mode)), Target: readable(e.Target),
	}
	for _, n := range e.Names {
		res.Path = append(res.Path, readable(n))
	}
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		res.Size = uint64(e.Size)
		res.Digest = []string{"sha256:" + e.SHA256}
	case unix.S_IFCHR, unix.S_IFBLK:
		res.Major, res.Minor = uint64(unix.Major(e.Rdev)), uint64(unix.Minor(e.Rdev))
	}
	names := make([]string, 0, len(e.Xattrs))
	for name := range e.Xattrs {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		res.Xattr = append(res.Xattr, &proto.XAttr{Name: name, Data: []byte(e.Xattrs[name])})
	}
	if all := strings.Join(e.Names, "\x00"); !utf8.ValidString(all) {
		res.Xattr = append(res.Xattr, &proto.XAttr{Name: namesXattr, Data: []byte(all)})
	}
	if !utf8.ValidString(e.Target) {
		res.Xattr = append(res.Xattr, &proto.XAttr{Name: targetXattr, Data: []byte(e.Target)})
	}
	res.Xattr = append(res.Xattr, &proto.XAttr{Name: mtimeXattr, Data: strconv.AppendInt(nil, e.MTime, 10)})
	return res
}

// readable is s, quoted if it is not UTF-8.
func readable(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return strconv.QuoteToASCII(s)
}

func entryOf(res *proto.Resource) (Entry, error) {
	e := Entry{
		Names: res.Path, UID: uint32(res.Uid), GID: uint32(res.Gid),
		Mode: statMode(fs.FileMode(res.Mode)), Size: int64(res.Size), Target: res.Target,
	}
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if len(res.Digest) != 1 || !strings.HasPrefix(res.Digest[0], "sha256:") {
			return e, fmt.Errorf("%q has no sha256", res.Path)
		}
		e.SHA256 = res.Digest[0][len("sha256:"):]
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = unix.Mkdev(uint32(res.Major), uint32(res.Minor))
	}
	timed := false
	for _, x := range res.Xattr {
		if x.Name == mtimeXattr {
			t, err := strconv.ParseInt(string(x.Data), 10, 64)
			if err != nil {
				return e, fmt.Errorf("%q: time: %w", res.Path, err)
			}
			e.MTime, timed = t, true
			continue
		}
		if x.Name == namesXattr {
			e.Names = strings.Split(string(x.Data), "\x00")
			continue
		}
		if x.Name == targetXattr {
			e.Target = string(x.Data)
			continue
		}
		if e.Xattrs == nil {
			e.Xattrs = map[string]string{}
		}
		e.Xattrs[x.Name] = string(x.Data)
	}
	if !timed {
		return e, fmt.Errorf("%q has no time", res.Path)
	}
	return e, checkNames(e.Names)
}

// checkNames refuses what is no name in a tree. They may be any bytes.
func checkNames(names []string) error {
	if len(names) == 0 {
		return errors.New("no name")
	}
	for _, n := range names {
		if n != path.Clean(n) || !filepath.IsLocal(n) || strings.ContainsRune(n, 0) {
			return fmt.Errorf("%q is not a name in a tree", n)
		}
	}
	return nil
}

// modeBits pairs stat's type and special bits with those of package os.
var modeBits = []struct {
	stat uint32
	os   fs.FileMode
}{
	{unix.S_ISUID, fs.ModeSetuid}, {unix.S_ISGID, fs.ModeSetgid}, {unix.S_ISVTX, fs.ModeSticky},
}

var typeBits = map[uint32]fs.FileMode{
	unix.S_IFREG: 0, unix.S_IFDIR: fs.ModeDir, unix.S_IFLNK: fs.ModeSymlink,
	unix.S_IFIFO: fs.ModeNamedPipe, unix.S_IFSOCK: fs.ModeSocket,
	unix.S_IFCHR: fs.ModeDevice | fs.ModeCharDevice, unix.S_IFBLK: fs.ModeDevice,
}

func fileMode(stat uint32) fs.FileMode {
	m := fs.FileMode(stat&0o777) | typeBits[stat&unix.S_IFMT]
	for _, b := range modeBits {
		if stat&b.stat != 0 {
			m |= b.os
		}
	}
	return m
}

// FileMode is the entry's mode as package os has it.
func (e *Entry) FileMode() fs.FileMode { return fileMode(e.Mode) }

func statMode(m fs.FileMode) uint32 {
	out := uint32(m.Perm())
	for stat, bits := range typeBits {
		if m.Type() == bits {
			out |= stat
		}
	}
	for _, b := range modeBits {
		if m&b.os != 0 {
			out |= b.stat
		}
	}
	return out
}
