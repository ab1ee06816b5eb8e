package foreign

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/fsck/reach"
)

// folder is a store's files, by names below it. No name leads out of it.
type folder interface {
	// stat returns the size of a regular file, fs.ErrNotExist or
	// reach.ErrNotRegular.
	stat(name string) (int64, error)
	// open opens a regular file, or returns what stat does.
	open(name string) (io.ReadCloser, error)
	// list returns the names in a directory, none if it is not there.
	list(dir string) ([]string, error)
	close()
}

// directory is a folder on disk.
type directory struct{ root *os.Root }

func openDirectory(name string) (directory, error) {
	root, err := os.OpenRoot(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	case err != nil:
		err = fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return directory{root}, err
}

func (d directory) stat(name string) (int64, error) {
	fi, err := d.root.Lstat(name)
	if err != nil {
		return 0, err
	}
	if !fi.Mode().IsRegular() {
		return 0, reach.ErrNotRegular
	}
	return fi.Size(), nil
}

func (d directory) open(name string) (io.ReadCloser, error) {
	if _, err := d.stat(name); err != nil {
		return nil, err
	}
	return d.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
}

// isDir tells whether there is a directory, and no link to one.
func (d directory) isDir(name string) bool {
	fi, err := d.root.Lstat(name)
	return err == nil && fi.IsDir()
}

func (d directory) list(dir string) ([]string, error) {
	f, err := d.root.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

func (d directory) close() { d.root.Close() }

// archive is a folder in a tar file, which is read once for its names.
type archive struct {
	file    *os.File
	members map[string]member
}

type member struct {
	off, size int64
	regular   bool
}

// openArchive reads the names in a tar file.
func openArchive(name string) (*archive, error) {
	f, err := reach.Regular(unix.AT_FDCWD, name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	a := &archive{file: f, members: map[string]member{}}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return a, nil
		}
		off, serr := f.Seek(0, io.SeekCurrent)
		if err = errors.Join(err, serr); err != nil {
			f.Close()
			return nil, fmt.Errorf("not a folder, and no tar file (a compressed one has to be unpacked first): %w: %w", err, errdefs.ErrInvalidArgument)
		}
		a.members[strings.TrimPrefix(path.Clean("/"+h.Name), "/")] = member{off, h.Size, h.Typeflag == tar.TypeReg}
	}
}

func (a *archive) stat(name string) (int64, error) {
	m, ok := a.members[path.Clean(name)]
	switch {
	case !ok:
		return 0, fs.ErrNotExist
	case !m.regular:
		return 0, reach.ErrNotRegular
	}
	return m.size, nil
}

func (a *archive) open(name string) (io.ReadCloser, error) {
	if _, err := a.stat(name); err != nil {
		return nil, err
	}
	m := a.members[path.Clean(name)]
	return io.NopCloser(io.NewSectionReader(a.file, m.off, m.size)), nil
}

func (a *archive) list(dir string) (out []string, _ error) {
	for name := range a.members {
		if path.Dir(name) == path.Clean(dir) {
			out = append(out, path.Base(name))
		}
	}
	return out, nil
}

func (a *archive) close() { a.file.Close() }

// What readSmall says besides the errors of reading.
var (
	errEmpty   = errors.New("0 bytes")
	errTooLong = errors.New("it is longer than anything of its kind")
)

// readSmall reads one of a store's small files, which is never an empty one.
func readSmall(f folder, name string) ([]byte, error) {
	r, err := f.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	switch {
	case err != nil:
	case len(data) == 0:
		err = errEmpty
	case len(data) > maxDocument:
		err = errTooLong
	}
	return data, err
}
