package builder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/continuity/fs"
	"github.com/moby/buildkit/solver/pb"
	copyfs "github.com/tonistiigi/fsutil/copy"

	"varve.dev/errdefs"
)

// times turns an action's time into what copy takes; nil leaves times alone.
func times(ns int64) *time.Time {
	if ns == -1 {
		return nil
	}
	t := time.Unix(0, ns)
	return &t
}

func makeDir(root string, a *pb.FileActionMkDir, owner copyfs.Chowner) error {
	p, err := fs.RootPath(root, filepath.Join("/", a.Path))
	if err != nil {
		return err
	}
	if a.MakeParents {
		_, err = copyfs.MkdirAll(p, os.FileMode(a.Mode)&0o777, owner, times(a.Timestamp))
		return err
	}
	if err := os.Mkdir(p, os.FileMode(a.Mode)&0o777); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil
		}
		return err
	}
	return dress(p, owner, a.Timestamp)
}

func dress(p string, owner copyfs.Chowner, ns int64) error {
	if err := copyfs.Chown(p, nil, owner); err != nil {
		return err
	}
	return copyfs.Utimes(p, times(ns))
}

func makeFile(root string, a *pb.FileActionMkFile, owner copyfs.Chowner) error {
	p, err := fs.RootPath(root, filepath.Join("/", a.Path))
	if err != nil {
		return err
	}
	// What stands there goes first: a device node must never be written to.
	if fi, err := os.Lstat(p); err == nil && !fi.IsDir() {
		if err := os.Remove(p); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(a.Data)
	if err = errors.Join(err, f.Chmod(os.FileMode(a.Mode)&0o777), f.Close()); err != nil {
		return err
	}
	return dress(p, owner, a.Timestamp)
}

func makeLink(root string, a *pb.FileActionSymlink, owner copyfs.Chowner) error {
	p, err := fs.RootPath(root, filepath.Join("/", a.Newpath))
	if err != nil {
		return err
	}
	if err := os.Symlink(a.Oldpath, p); err != nil {
		return err
	}
	return dress(p, owner, a.Timestamp)
}

func remove(root string, a *pb.FileActionRm) error {
	names := []string{filepath.Join("/", a.Path)}
	if a.AllowWildcard {
		var err error
		if names, err = copyfs.ResolveWildcards(root, strings.TrimPrefix(names[0], "/"), false); err != nil {
			return err
		}
	}
	for _, name := range names {
		dir, base := filepath.Split(filepath.Join("/", name))
		if base == "" {
			return fmt.Errorf("the root cannot be removed: %w", errdefs.ErrInvalidArgument)
		}
		dir, err := fs.RootPath(root, dir)
		if err != nil {
			return err
		}
		p := filepath.Join(dir, base)
		if _, err := os.Lstat(p); err != nil && !a.AllowNotFound {
			return err
		}
		if err := os.RemoveAll(p); err != nil {
			return err
		}
	}
	return nil
}

func copyFiles(ctx context.Context, src, dst string, a *pb.FileActionCopy, owner copyfs.Chowner) error {
	if !a.CreateDestPath {
		p, err := fs.RootPath(dst, filepath.Join("/", a.Dest))
		if err != nil {
			return err
		}
		if _, err := os.Lstat(filepath.Dir(p)); err != nil {
			return err
		}
	}
	// A slash at the end says that the destination is a directory.
	to := keepSlash(a.Dest)
	names := []string{keepSlash(a.Src)}
	if a.AllowWildcard {
		var err error
		if names, err = copyfs.ResolveWildcards(src, names[0], a.FollowSymlink); err != nil {
			return err
		}
		if len(names) == 0 {
			if a.AllowEmptyWildcard {
				return nil
			}
			return fmt.Errorf("%s: nothing matches: %w", a.Src, errdefs.ErrNotFound)
		}
	}
	options := copyOptions(a, owner)
	for _, name := range names {
		if a.AttemptUnpackDockerCompatibility {
			done, err := unpack(ctx, src, name, dst, to, owner, a.Timestamp)
			if err != nil {
				return err
			}
			if done {
				continue
			}
		}
		if err := copyfs.Copy(ctx, src, name, dst, to, options); err != nil {
			return err
		}
	}
	return nil
}

func copyOptions(a *pb.FileActionCopy, owner copyfs.Chowner) copyfs.Opt {
	return func(c *copyfs.CopyInfo) {
		c.IncludePatterns, c.ExcludePatterns = a.IncludePatterns, a.ExcludePatterns
		c.Chown, c.Utime = owner, times(a.Timestamp)
		if a.ModeStr != "" {
			c.ModeStr = a.ModeStr
		} else if m := int(a.Mode); m != -1 {
			c.Mode = &m
		}
		c.CopyDirContents, c.FollowLinks = a.DirCopyContents, a.FollowSymlink
		c.AlwaysReplaceExistingDestPaths = a.AlwaysReplaceExistingDestPaths
	}
}

// keepSlash cleans a path and keeps what its end says: "dir/" is a directory,
// "dir/." what is in it.
func keepSlash(p string) string {
	clean := filepath.Join("/", p)
	end := ""
	switch {
	case strings.HasSuffix(p, "/."):
		end = "/."
	case strings.HasSuffix(p, "/"):
		end = "/"
	}
	if clean == "/" {
		return clean + strings.TrimPrefix(end, "/")
	}
	return clean + end
}
