package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// MkdirAll makes rel and its missing parents. After nil all of them are
// durable; after an error some of the parents may exist.
func (r *Root) MkdirAll(rel string, perm fs.FileMode) error {
	if err := r.may(rel); err != nil {
		return err
	}
	if fi, err := os.Lstat(r.Path(rel)); err == nil && fi.IsDir() {
		return nil
	}
	if parent := filepath.Dir(rel); parent != "." {
		if err := r.MkdirAll(parent, perm); err != nil {
			return err
		}
	}
	if err := r.mkdir(rel, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return r.SyncDirs(filepath.Dir(rel))
}

// Mkdir makes one directory that must not exist. Its name is not yet durable:
// it is for staging, whose loss is harmless. After an error it is not there.
func (r *Root) Mkdir(rel string, perm fs.FileMode) error {
	if err := r.may(rel); err != nil {
		return err
	}
	return r.mkdir(rel, perm)
}

// MkdirOwned is Mkdir for a directory of another owner. The mode may have the
// setuid, setgid and sticky bits.
func (r *Root) MkdirOwned(rel string, perm fs.FileMode, uid, gid int) error {
	if err := r.Mkdir(rel, 0o700); err != nil {
		return err
	}
	// The owner comes first: chown takes the special bits away.
	err := os.Lchown(r.Path(rel), uid, gid)
	if err == nil {
		err = os.Chmod(r.Path(rel), perm)
	}
	if err != nil {
		os.Remove(r.Path(rel))
		return kinded("make directory", err)
	}
	r.observe(Op{Kind: OpSetattr, Path: rel})
	return nil
}

func (r *Root) mkdir(rel string, perm fs.FileMode) error {
	if err := os.Mkdir(r.Path(rel), perm); err != nil {
		return kinded("make directory", err)
	}
	// The mode is ours to choose, whatever the caller's umask is.
	if err := os.Chmod(r.Path(rel), perm); err != nil {
		os.Remove(r.Path(rel))
		return kinded("make directory", err)
	}
	r.observe(Op{Kind: OpMkdir, Path: rel})
	return nil
}

// Rename gives old the name new, which must not exist. The names are not yet
// durable: call [Root.SyncDirs] on both directories, once for many renames.
// After an error nothing changed.
func (r *Root) Rename(old, new string) error {
	if err := r.may(old, new); err != nil {
		return err
	}
	err := unix.Renameat2(unix.AT_FDCWD, r.Path(old), unix.AT_FDCWD, r.Path(new), unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) {
		// A file system without NOREPLACE: names in the store are unique
		// by construction, so looking first loses nothing but a race that
		// no two callers can run.
		if _, serr := os.Lstat(r.Path(new)); serr == nil {
			err = unix.EEXIST
		} else {
			err = unix.Rename(r.Path(old), r.Path(new))
		}
	}
	if err != nil {
		return kinded("rename", &os.LinkError{Op: "rename", Old: r.Path(old), New: r.Path(new), Err: err})
	}
	r.observe(Op{Kind: OpRename, Path: old, To: new})
	return nil
}

// SyncDirs makes the names in each of the directories durable. A failure
// poisons the root.
func (r *Root) SyncDirs(rels ...string) error {
	if err := r.may(rels...); err != nil {
		return err
	}
	seen := make(map[string]bool, len(rels))
	for _, rel := range rels {
		if seen[rel] {
			continue
		}
		seen[rel] = true
		if err := syncPath(r.Path(rel)); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return kinded("sync directory", err)
			}
			return r.failedSync(r.Path(rel), err)
		}
		r.observe(Op{Kind: OpSyncDir, Path: rel})
	}
	return nil
}

// Publish renames old, whose contents are durable already, to new and makes
// both names durable. After an error of the rename nothing changed.
func (r *Root) Publish(old, new string) error {
	if err := r.Rename(old, new); err != nil {
		return err
	}
	return r.SyncDirs(filepath.Dir(new), filepath.Dir(old))
}

// Remove takes one file or empty directory away; a name that is not there is
// no error. Not yet durable.
func (r *Root) Remove(rel string) error {
	if err := r.may(rel); err != nil {
		return err
	}
	if err := os.Remove(r.Path(rel)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return kinded("remove", err)
	}
	r.observe(Op{Kind: OpRemove, Path: rel})
	return nil
}

// RemoveAll takes a tree away, whatever its modes and owners. Not durable and
// not atomic: it is for trash and staging only, where what is left after a
// crash is removed again. What is not there is no error.
func (r *Root) RemoveAll(rel string) error {
	if err := r.may(rel); err != nil {
		return err
	}
	err := os.RemoveAll(r.Path(rel))
	if errors.Is(err, unix.EPERM) {
		// Immutable or append-only files cannot come from a tar stream,
		// but a container with CAP_LINUX_IMMUTABLE can leave them.
		if clearFlags(r.Path(rel)) == nil {
			err = os.RemoveAll(r.Path(rel))
		}
	}
	if err != nil {
		return kinded("remove tree", err)
	}
	r.observe(Op{Kind: OpRemove, Path: rel})
	return nil
}

const (
	fsImmutable  = 0x10
	fsAppendOnly = 0x20
)

// clearFlags takes the immutable and append-only flags off everything below
// path.
func clearFlags(path string) error {
	return filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil || (!d.IsDir() && !d.Type().IsRegular()) {
			return err
		}
		f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
		if err != nil || flags&(fsImmutable|fsAppendOnly) == 0 {
			return nil
		}
		return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags&^(fsImmutable|fsAppendOnly))
	})
}
