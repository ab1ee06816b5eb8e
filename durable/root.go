package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
)

// Root is the directory that one store lives in. All names given to its
// methods are relative to it and may not leave it.
type Root struct {
	path     string
	dir      *os.File
	fsType   int64
	marker   sync.Mutex // one writer of the barrier's marker at a time
	poison   atomic.Pointer[error]
	observer atomic.Pointer[Observer]
}

// Open opens the directory at path, which must exist (see [Create]).
func Open(path string) (*Root, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("store root %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	dir, err := os.OpenFile(abs, os.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, kinded(fmt.Sprintf("store root %s", abs), err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		dir.Close()
		return nil, kinded(fmt.Sprintf("store root %s", abs), err)
	}
	return &Root{path: abs, dir: dir, fsType: int64(st.Type)}, nil
}

// Create makes the directory at path, its parents too, and opens it.
// After nil the directory's own name is durable. One that exists already is
// opened as it is.
func Create(path string, perm fs.FileMode) (*Root, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("store root %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	var made []string
	for p := abs; ; p = filepath.Dir(p) {
		if _, err := os.Lstat(p); err == nil || p == "/" {
			break
		}
		made = append(made, p)
	}
	if err := os.MkdirAll(abs, perm); err != nil {
		return nil, kinded("store root "+abs, err)
	}
	for _, p := range made {
		if err := syncPath(filepath.Dir(p)); err != nil {
			return nil, kinded("store root "+abs, err)
		}
	}
	return Open(abs)
}

// Close lets go of the directory. It does not sync.
func (r *Root) Close() error { return r.dir.Close() }

// Path returns the absolute path of a name in the root, for reading, for
// mounts and for messages. Nothing may be changed through it.
func (r *Root) Path(rel string) string { return filepath.Join(r.path, rel) }

// Poison ends all changes through this Root because of err, the failure of a
// sync. Package metadata calls it when a commit fails. The first cause stays.
func (r *Root) Poison(err error) { r.poison.CompareAndSwap(nil, &err) }

// Poisoned returns nil, or an error of kind ErrPoisoned with its cause.
func (r *Root) Poisoned() error {
	if p := r.poison.Load(); p != nil {
		return fmt.Errorf("store root %s: %w (cause: %s)", r.path, errdefs.ErrPoisoned, (*p).Error())
	}
	return nil
}

// PoisonCause returns what [Root.Poison] was first called with; nil before.
func (r *Root) PoisonCause() error {
	if p := r.poison.Load(); p != nil {
		return *p
	}
	return nil
}

// may checks that names are local and the root is healthy before a change.
func (r *Root) may(names ...string) error {
	for _, n := range names {
		if !filepath.IsLocal(n) {
			return fmt.Errorf("name %q leaves the store root: %w", n, errdefs.ErrInvalidArgument)
		}
	}
	return r.Poisoned()
}

// failedSync poisons the root and returns the error to hand on.
func (r *Root) failedSync(path string, err error) error {
	err = fmt.Errorf("sync %s: %w", path, bare(err))
	r.Poison(err)
	return fmt.Errorf("%w: %w", err, errdefs.ErrPoisoned)
}

// bare takes the name of call and file off an error: they are said already.
func bare(err error) error {
	var call *fs.PathError
	if errors.As(err, &call) {
		return call.Err
	}
	return err
}

// kinded gives an operating system error the kind that callers test for; one
// that has a kind keeps it.
func kinded(what string, err error) error {
	if errdefs.Has(err) {
		return fmt.Errorf("%s: %w", what, err)
	}
	var kind error = errdefs.ErrUnknown
	switch {
	case errors.Is(err, fs.ErrNotExist):
		kind = errdefs.ErrNotFound
	case errors.Is(err, fs.ErrExist), errors.Is(err, unix.ENOTEMPTY):
		kind = errdefs.ErrAlreadyExists
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		kind = errdefs.ErrResourceExhausted
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		kind = errdefs.ErrPermissionDenied
	case errors.Is(err, unix.EIO):
		kind = errdefs.ErrDataLoss
	}
	return fmt.Errorf("%s: %w: %w", what, err, kind)
}

func syncPath(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// FileSystem names the file system that the root is on, for people.
func (r *Root) FileSystem() string {
	names := map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs",
		unix.TMPFS_MAGIC: "tmpfs", unix.OVERLAYFS_SUPER_MAGIC: "overlay",
	}
	if name, ok := names[r.fsType]; ok {
		return name
	}
	return fmt.Sprintf("type %#x", r.fsType)
}
