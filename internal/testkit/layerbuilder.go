package testkit

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Layer is a layer blob of a layout, with what the config says of it.
type Layer struct {
	ocispec.Descriptor
	DiffID    digest.Digest
	CreatedBy string
}

// LayerBuilder writes one layer's tar stream, entry by entry, in the order
// of the calls and without any check: fixtures need what no sane tool writes.
// The first error sticks and comes back from [Layout.AddLayer].
type LayerBuilder struct {
	w   io.Writer // below tw, for entries that archive/tar cannot write
	tw  *tar.Writer
	err error
}

// Attr changes an entry's header before it is written.
type Attr func(*tar.Header)

// Owner sets numeric owner and group.
func Owner(uid, gid int) Attr { return func(h *tar.Header) { h.Uid, h.Gid = uid, gid } }

// MTime sets the modification time, to the nanosecond.
func MTime(t time.Time) Attr {
	return func(h *tar.Header) { h.ModTime, h.Format = t, tar.FormatPAX }
}

// Xattr adds an extended attribute.
func Xattr(name, value string) Attr {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
		h.Format = tar.FormatPAX
	}
}

// GNU writes the entry in GNU's format, which carries names as raw bytes.
func GNU(h *tar.Header) { h.Format = tar.FormatGNU }

// Dir adds a directory. mode holds the permission bits with setuid, setgid
// and sticky as in chmod(2): 0o4000, 0o2000, 0o1000.
func (b *LayerBuilder) Dir(name string, mode int64, attrs ...Attr) {
	b.entry(tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimSuffix(name, "/") + "/", Mode: mode}, nil, attrs)
}

// File adds a regular file.
func (b *LayerBuilder) File(name string, mode int64, data []byte, attrs ...Attr) {
	b.entry(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data))}, data, attrs)
}

// Text adds a regular file of mode 0644.
func (b *LayerBuilder) Text(name, data string, attrs ...Attr) {
	b.File(name, 0o644, []byte(data), attrs...)
}

// Symlink adds a symbolic link.
func (b *LayerBuilder) Symlink(name, target string, attrs ...Attr) {
	b.entry(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil, attrs)
}

// Mode sets the permission bits, for entries whose method takes none.
func Mode(mode int64) Attr { return func(h *tar.Header) { h.Mode = mode } }

// Hardlink adds another name for target, a path from the root of the image.
// Unpackers differ in whether the header's owner, mode and time are applied to
// the shared inode: attrs should repeat what the target has, as tar(1) does.
func (b *LayerBuilder) Hardlink(name, target string, attrs ...Attr) {
	b.entry(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}, nil, attrs)
}

// Node adds a character device, block device or fifo.
func (b *LayerBuilder) Node(kind byte, name string, mode, major, minor int64, attrs ...Attr) {
	b.entry(tar.Header{Typeflag: kind, Name: name, Mode: mode, Devmajor: major, Devminor: minor}, nil, attrs)
}

// Whiteout removes name, which a lower layer has.
func (b *LayerBuilder) Whiteout(name string) {
	dir, base := splitName(name)
	b.File(dir+".wh."+base, 0o600, nil)
}

// Opaque hides what lower layers have in the directory name.
func (b *LayerBuilder) Opaque(name string) {
	b.File(strings.TrimSuffix(name, "/")+"/.wh..wh..opq", 0o600, nil)
}

func splitName(name string) (dir, base string) {
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return name[:i+1], name[i+1:]
	}
	return "", name
}

func (b *LayerBuilder) entry(h tar.Header, data []byte, attrs []Attr) {
	if b.err != nil {
		return
	}
	h.ModTime = Epoch
	for _, attr := range attrs {
		attr(&h)
	}
	if err := b.tw.WriteHeader(&h); err != nil {
		b.err = fmt.Errorf("entry %q: %w", h.Name, err)
		return
	}
	if _, err := b.tw.Write(data); err != nil {
		b.err = fmt.Errorf("entry %q: %w", h.Name, err)
	}
}

// Raw adds blocks as they are: whole entries, headers included.
func (b *LayerBuilder) Raw(blocks []byte) {
	if b.err != nil {
		return
	}
	if b.err = b.tw.Flush(); b.err == nil {
		_, b.err = b.w.Write(blocks)
	}
}

// Compression is how a layer is stored.
type Compression string

// What the OCI image specification lets a layer be.
const (
	Plain Compression = ocispec.MediaTypeImageLayer
	Gzip  Compression = ocispec.MediaTypeImageLayerGzip
	Zstd  Compression = ocispec.MediaTypeImageLayerZstd
)

func (c Compression) writer(w io.Writer) (io.WriteCloser, error) {
	switch c {
	case Plain:
		return nopCloser{w}, nil
	case Gzip:
		return gzip.NewWriterLevel(w, gzip.DefaultCompression)
	case Zstd:
		// One goroutine, so that the frames are the same each time.
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
	}
	return nil, fmt.Errorf("unknown compression %q", c)
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// AddLayer stores the layer that fill writes.
func (l *Layout) AddLayer(c Compression, createdBy string, fill func(*LayerBuilder)) (Layer, error) {
	return l.addTar(c, createdBy, func(w io.Writer) error {
		b := &LayerBuilder{w: w, tw: tar.NewWriter(w)}
		fill(b)
		if b.err != nil {
			return b.err
		}
		return b.tw.Close()
	})
}

// AddTar stores an existing tar stream as a layer.
func (l *Layout) AddTar(c Compression, createdBy string, stream io.Reader) (Layer, error) {
	return l.addTar(c, createdBy, func(w io.Writer) error {
		_, err := io.Copy(w, stream)
		return err
	})
}

func (l *Layout) addTar(c Compression, createdBy string, write func(io.Writer) error) (Layer, error) {
	diff := digest.Canonical.Digester()
	desc, err := l.AddStream(string(c), func(blob io.Writer) error {
		cw, err := c.writer(blob)
		if err != nil {
			return err
		}
		if err := write(io.MultiWriter(cw, diff.Hash())); err != nil {
			return err
		}
		return cw.Close()
	})
	if err != nil {
		return Layer{}, fmt.Errorf("layer %q: %w", createdBy, err)
	}
	return Layer{desc, diff.Digest(), createdBy}, nil
}

// Tar returns the stream that fill writes, for tests that need no layout.
func Tar(fill func(*LayerBuilder)) ([]byte, error) {
	var buf bytes.Buffer
	b := &LayerBuilder{w: &buf, tw: tar.NewWriter(&buf)}
	fill(b)
	if b.err != nil {
		return nil, b.err
	}
	err := b.tw.Close()
	return buf.Bytes(), err
}
