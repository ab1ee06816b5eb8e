package durable

import (
	"errors"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// removeBatch is how many names of a directory are read at once.
const removeBatch = 256

// RemoveTree is [Root.RemoveAll] of a tree that may be large: next is called
// before each file goes, and its error, which is returned as it is, leaves the
// rest.
func (r *Root) RemoveTree(rel string, next func() error) error {
	if err := r.may(rel); err != nil {
		return err
	}
	var stopped error
	err := removeBelow(r.Path(rel), func() error {
		stopped = next()
		return stopped
	})
	switch {
	case stopped != nil:
		return stopped
	case err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.EPERM):
		return kinded("remove tree", err)
	}
	return r.RemoveAll(rel) // the root of it, and what only that gets rid of
}

// removeBelow empties a directory.
func removeBelow(path string, next func() error) error {
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	return emptyDir(dir, next)
}

// emptyDir removes what is in a directory, and closes it. It goes down through
// open directories: a path may be longer than the kernel takes.
func emptyDir(dir *os.File, next func() error) error {
	defer dir.Close()
	for {
		entries, err := dir.ReadDir(removeBatch)
		if err != nil && err != io.EOF {
			return err
		}
		for _, e := range entries {
			if err := removeEntry(dir, e, next); err != nil {
				return err
			}
		}
		if len(entries) == 0 {
			return nil
		}
		// What is removed may move the position of what is not: from the
		// beginning again.
		if _, err := dir.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
}

func removeEntry(dir *os.File, e fs.DirEntry, next func() error) error {
	fd := int(dir.Fd())
	flags := 0
	if e.IsDir() {
		below, err := unix.Openat(fd, e.Name(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return &fs.PathError{Op: "openat", Path: e.Name(), Err: err}
		}
		if err := emptyDir(os.NewFile(uintptr(below), e.Name()), next); err != nil {
			return err
		}
		flags = unix.AT_REMOVEDIR
	}
	if err := next(); err != nil {
		return err
	}
	if err := unix.Unlinkat(fd, e.Name(), flags); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "unlinkat", Path: e.Name(), Err: err}
	}
	return nil
}
