package builder

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/buildkit/util/gitutil"
	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
)

// checkout makes the files of the commit the contents of dir.
func (r *gitRepo) checkout(ctx context.Context, dir string) error {
	if err := r.failed("check out", empty(dir)); err != nil {
		return err
	}
	subdir := relative(r.o.subdir)
	tree := dir
	if subdir != "." {
		var err error
		if tree, err = os.MkdirTemp(dir, "checkout-"); err != nil {
			return r.failed("check out", err)
		}
	}
	err := r.files(ctx, tree, r.o.keepDir && subdir == ".")
	if err == nil && subdir != "." {
		err = r.lift(dir, tree, subdir)
	}
	if err == nil && r.o.mtime == mtimeCommit {
		err = r.setTimes(ctx, dir)
	}
	return err
}

// files checks out into tree, with a .git of its own or without.
func (r *gitRepo) files(ctx context.Context, tree string, dotGit bool) error {
	if !dotGit {
		return r.bare(ctx, tree)
	}
	own, err := r.clone(ctx, tree)
	if err != nil {
		return err
	}
	return r.submodules(ctx, own)
}

// bare checks out without a .git. Submodules are kept with the repository. A
// kept one may be of another URL than this commit has for it; then it is of no
// use, and all is done once more without it.
func (r *gitRepo) bare(ctx context.Context, tree string) (err error) {
	modules := filepath.Join(r.dir, "modules")
	defer func() {
		err = errors.Join(err, r.configure(""))
		if len(credentials(r.o.remote)) > 0 {
			// They are in the URLs of submodules that are beside the remote.
			err = errors.Join(err, r.failed("check out", os.RemoveAll(modules)))
		}
	}()
	_, none := os.Lstat(modules)
	err = r.bareOnce(ctx, tree)
	if err == nil || none != nil || ctx.Err() != nil {
		return err
	}
	if err := r.failed("check out", errors.Join(os.RemoveAll(modules), empty(tree))); err != nil {
		return err
	}
	return r.bareOnce(ctx, tree)
}

// bareOnce: the index is the kept repository's, of the last checkout, which was
// somewhere else.
func (r *gitRepo) bareOnce(ctx context.Context, tree string) error {
	if err := os.Remove(filepath.Join(r.dir, "index")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r.failed("check out", err)
	}
	if err := r.configure(r.o.remote); err != nil {
		return err
	}
	into := r.with(gitutil.WithDir(tree), gitutil.WithWorkTree(tree))
	if _, err := into.run(ctx, "check out", "read-tree", "--reset", "-u", r.at.id); err != nil {
		return err
	}
	if err := r.submodules(ctx, into); err != nil || r.o.noSubmodules {
		return err
	}
	return r.failed("check out", removeLinks(tree))
}

// clone checks out with a .git that has this commit and no history.
func (r *gitRepo) clone(ctx context.Context, tree string) (*gitCommand, error) {
	dot := filepath.Join(tree, ".git")
	own := r.with(gitutil.WithDir(tree), gitutil.WithWorkTree(tree), gitutil.WithGitDir(dot))
	from := gitHeld + r.at.id
	if !gitutil.IsCommitSHA(r.at.ref) {
		from += ":" + r.at.ref
	}
	for _, args := range [][]string{
		{"init", "--initial-branch=master", "--object-format=" + r.at.format()},
		// By way of the protocol: what a repository has beside its objects
		// can not get into a clone that is not made of its files.
		{"remote", "add", gitRemote, "file://" + r.dir},
		{"fetch", "--update-head-ok", "--depth=1", "--no-tags", "--", gitRemote, from},
		{"checkout", "FETCH_HEAD"},
		{"remote", "set-url", gitRemote, r.o.redacted()},
		{"reflog", "expire", "--all", "--expire=now"},
	} {
		if _, err := own.run(ctx, "check out", args...); err != nil {
			return nil, err
		}
	}
	if err := os.Remove(filepath.Join(dot, "FETCH_HEAD")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, r.failed("check out", err)
	}
	return own, nil
}

func (r *gitRepo) submodules(ctx context.Context, in *gitCommand) error {
	if r.o.noSubmodules {
		return nil
	}
	_, err := in.run(ctx, "update submodules", "submodule", "update", "--init", "--recursive", "--depth=1")
	return err
}

// removeLinks removes what leads from the submodules to the kept repository.
// Git itself has nothing in a tree that is called so.
func removeLinks(tree string) error {
	if _, err := os.Lstat(filepath.Join(tree, ".gitmodules")); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return filepath.WalkDir(tree, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == ".git" && d.Type().IsRegular() {
			err = os.Remove(p)
		}
		return err
	})
}

// lift moves what is in a subdirectory of a checkout to where all of it was to
// go.
func (r *gitRepo) lift(dir, tree, subdir string) error {
	root, err := os.OpenRoot(tree)
	if err != nil {
		return r.failed("open the subdirectory", err)
	}
	defer root.Close()
	at := ""
	for _, part := range strings.Split(subdir, "/") {
		at = path.Join(at, part)
		info, err := root.Lstat(at)
		if err != nil {
			return fmt.Errorf("source %s: subdirectory %s: %w: %w", r.o.redacted(), subdir, err, errdefs.ErrNotFound)
		}
		if !info.IsDir() {
			// A link would lead to what the identifier does not name.
			return fmt.Errorf("source %s: git subpath %q contains non-directory %q: %w", r.o.redacted(), subdir, at, errdefs.ErrFailedPrecondition)
		}
	}
	from := filepath.Join(tree, subdir)
	entries, err := os.ReadDir(from)
	if err != nil {
		return r.failed("open the subdirectory", err)
	}
	for _, e := range entries {
		if err := os.Rename(filepath.Join(from, e.Name()), filepath.Join(dir, e.Name())); err != nil {
			return r.failed("open the subdirectory", err)
		}
	}
	return r.failed("open the subdirectory", os.RemoveAll(tree))
}

func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

// setTimes gives everything the time of the commit.
func (r *gitRepo) setTimes(ctx context.Context, dir string) error {
	out, err := r.run(ctx, "read the commit's time", "log", "-1", "--format=%ct", r.at.id+"^{commit}")
	if err != nil {
		return err
	}
	seconds, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil {
		return fmt.Errorf("source %s: the commit's time %q: %w: %w", r.o.redacted(), out, err, errdefs.ErrFailedPrecondition)
	}
	return r.failed("set times", setTimes(dir, time.Unix(seconds, 0)))
}

// setTimes sets the time of last change of a tree, from below: what is done in
// a directory would change its own again.
func setTimes(dir string, t time.Time) error {
	var all []string
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		all = append(all, p)
		return err
	})
	if err != nil {
		return err
	}
	at := unix.NsecToTimespec(t.UnixNano())
	for _, p := range slices.Backward(all) {
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &fs.PathError{Op: "utimensat", Path: p, Err: err}
		}
	}
	return nil
}
