package layer

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
)

// ExportOptions may be left zero.
type ExportOptions struct {
	// Latest is the time that files get which are younger; nil leaves times
	// as they are.
	Latest *time.Time
}

// Export writes the layer whose tree m describes and dir holds as an OCI
// layer: names in order, whiteouts in the stream's form, times to the
// nanosecond and xattrs as PAX records. The bytes depend on the manifest and
// the contents alone. The root directory is not listed.
//
// A file that is not as long as the manifest says is reported as Corrupt (L4).
func Export(ctx context.Context, w io.Writer, m *Manifest, dir string, o ExportOptions) error {
	tw := tar.NewWriter(w)
	buf := make([]byte, copyBuffer)
	for _, item := range inOrder(m) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := exportEntry(tw, item, dir, buf, o); err != nil {
			return fmt.Errorf("export %q: %w", item.name, err)
		}
	}
	if err := tw.Close(); err != nil {
		return fmt.Errorf("export: %w", err)
	}
	return nil
}

// named is one name of an entry; all but the first are hard links to it.
type named struct {
	name  string
	entry *Entry
}

// inOrder lists all names so that each directory comes before what is in it
// and each first name before its links.
func inOrder(m *Manifest) []named {
	var all []named
	for i := range m.Entries {
		for _, n := range m.Entries[i].Names {
			if n != "." {
				all = append(all, named{n, &m.Entries[i]})
			}
		}
	}
	slices.SortFunc(all, func(a, b named) int { return strings.Compare(a.name, b.name) })
	return all
}

func exportEntry(tw *tar.Writer, item named, dir string, buf []byte, o ExportOptions) error {
	e := item.entry
	if o.Latest != nil && e.MTime > o.Latest.UnixNano() {
		older := *e
		older.MTime = o.Latest.UnixNano()
		e = &older
	}
	if e.IsWhiteout() {
		return tw.WriteHeader(whiteoutHeader(item.name, whiteoutPrefix+path.Base(item.name), e))
	}
	if strings.HasPrefix(path.Base(item.name), whiteoutPrefix) {
		return fmt.Errorf("an image cannot hold it: a name that begins with %s means a deletion there: %w", whiteoutPrefix, errdefs.ErrInvalidArgument)
	}
	hdr, err := headerOf(item.name, e)
	if err != nil {
		return err
	}
	if err := tw.WriteHeader(hdr); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	switch {
	case hdr.Typeflag == tar.TypeReg:
		return exportContents(tw, e, dir, buf)
	case hdr.Typeflag == tar.TypeDir && e.IsOpaque():
		return tw.WriteHeader(whiteoutHeader(item.name+"/.", opaqueName, e))
	}
	return nil
}

// whiteoutHeader is an empty file beside or in the place that name says.
func whiteoutHeader(name, base string, e *Entry) *tar.Header {
	return &tar.Header{
		Typeflag: tar.TypeReg, Name: path.Join(path.Dir(name), base), Mode: 0o600,
		Uid: int(e.UID), Gid: int(e.GID), ModTime: time.Unix(0, e.MTime), Format: tar.FormatPAX,
	}
}

func headerOf(name string, e *Entry) (*tar.Header, error) {
	hdr := &tar.Header{
		Name: name, Mode: int64(e.Mode & 0o7777), Uid: int(e.UID), Gid: int(e.GID),
		ModTime: time.Unix(0, e.MTime), Format: tar.FormatPAX,
	}
	if name != e.Names[0] {
		hdr.Typeflag, hdr.Linkname = tar.TypeLink, e.Names[0]
		return hdr, nil
	}
	for attr, value := range e.Xattrs {
		if attr == opaqueXattr {
			continue
		}
		if hdr.PAXRecords == nil {
			hdr.PAXRecords = map[string]string{}
		}
		hdr.PAXRecords[paxXattr+attr] = value
	}
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		hdr.Typeflag, hdr.Size = tar.TypeReg, e.Size
	case unix.S_IFDIR:
		hdr.Typeflag, hdr.Name = tar.TypeDir, name+"/"
	case unix.S_IFLNK:
		hdr.Typeflag, hdr.Linkname = tar.TypeSymlink, e.Target
	case unix.S_IFIFO:
		hdr.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		hdr.Typeflag = tar.TypeChar
		if e.Mode&unix.S_IFMT == unix.S_IFBLK {
			hdr.Typeflag = tar.TypeBlock
		}
		hdr.Devmajor, hdr.Devminor = int64(unix.Major(e.Rdev)), int64(unix.Minor(e.Rdev))
	default:
		return nil, fmt.Errorf("has a type that no archive can carry, mode %o: %w", e.Mode, errdefs.ErrInvalidArgument)
	}
	return hdr, nil
}

func exportContents(tw *tar.Writer, e *Entry, dir string, buf []byte) error {
	f, err := openIn(dir, e.Names[0])
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.CopyBuffer(struct{ io.Writer }{tw}, struct{ io.Reader }{io.LimitReader(f, e.Size)}, buf)
	if err != nil {
		return err
	}
	if n != e.Size {
		return &errdefs.Corrupt{Invariant: "L4", Object: f.Name(), Detail: fmt.Sprintf("%d bytes, the file manifest says %d", n, e.Size)}
	}
	return nil
}
