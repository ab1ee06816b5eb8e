package builder

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/util/gitutil"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Names in a kept repository. They are the builder's own, made of IDs, so that
// no name that the remote has or had can be in their way.
const (
	gitHeld     = "refs/varve/held/"    // what was fetched whole, by ID
	gitIncoming = "refs/varve/incoming" // what is being fetched
	gitAll      = "refs/varve/all/"     // the remote's branches and tags
)

// gitRepo is a bare repository that the builder keeps for one remote, so that a
// build fetches only what is new. It is a cache mount: it counts as one, and is
// dropped as one. One at a time uses it.
type gitRepo struct {
	*gitCommand
	rel, dir string // in the store, and where that is
	at       *gitAt
}

// inRepository runs fn with the source's repository, which has the commit. A
// repository that turns out to be damaged, as the power may leave it that was
// cut, is made anew, and fn is run once more.
func (o *gitOrigin) inRepository(ctx context.Context, fn func(*gitRepo) error) error {
	at, err := o.resolve(ctx)
	if err != nil {
		return err
	}
	k := newKeyHash("git repository")
	k.add(at.format(), o.remote)
	b, key := o.j.b, k.sum()
	rel := layout.CacheMountPath(key)
	unlock, err := b.mounts.lock(ctx, rel)
	if err != nil {
		return err
	}
	defer unlock()
	end, err := b.Space.UseMount(ctx, key)
	if err != nil {
		return err
	}
	defer end()
	c, err := o.command(ctx)
	if err != nil {
		return err
	}
	defer c.end()
	dir := b.Root.Path(rel)
	r := &gitRepo{gitCommand: c.with(gitutil.WithGitDir(dir)), rel: rel, dir: dir, at: at}
	for {
		isNew, err := r.open(ctx)
		if err == nil {
			err = r.fetch(ctx)
		}
		if err == nil {
			err = fn(r)
		}
		if err == nil || isNew || ctx.Err() != nil || r.sound(ctx) {
			return err
		}
		if err := b.Root.RemoveAll(rel); err != nil {
			return err
		}
	}
}

// sound tells whether the names in the repository stand for something, and all
// of the commit is there.
func (r *gitRepo) sound(ctx context.Context) bool {
	return r.ok(ctx, "rev-list", "--quiet", "--max-count=1", "--all") && (!r.held(ctx) || r.whole(ctx))
}

func (r *gitRepo) held(ctx context.Context) bool {
	return r.ok(ctx, "show-ref", "--verify", "--quiet", gitHeld+r.at.id)
}

func (r *gitRepo) whole(ctx context.Context) bool {
	return r.ok(ctx, "rev-list", "--objects", "--quiet", "--max-count=1", r.at.id+"^{commit}", "--")
}

// gitLocks are files that a git that was killed leaves behind.
var gitLocks = []string{"shallow.lock", "index.lock", "config.lock", "packed-refs.lock", gitIncoming + ".lock"}

// open makes the repository if it is not there. The time of its directory is
// when it was used last.
func (r *gitRepo) open(ctx context.Context) (isNew bool, err error) {
	if _, err := os.Lstat(r.dir); errors.Is(err, fs.ErrNotExist) {
		isNew = true
		if err := r.create(ctx); err != nil {
			return isNew, err
		}
	}
	for _, name := range gitLocks {
		_ = os.Remove(filepath.Join(r.dir, name))
	}
	now := time.Now()
	return isNew, errors.Join(r.configure(""), r.failed("open the kept repository", os.Chtimes(r.dir, now, now)))
}

// create makes an empty repository under a name that nobody uses yet.
func (r *gitRepo) create(ctx context.Context) error {
	root, begun := r.o.j.b.Root, r.rel+layout.CacheMountBegun
	if err := root.RemoveAll(begun); err != nil {
		return err
	}
	dir := root.Path(begun)
	if err := r.failed("make a repository", os.Mkdir(dir, 0o700)); err != nil {
		return err
	}
	_, err := r.with(gitutil.WithGitDir(dir)).run(ctx, "make a repository", "init", "--bare", "--template=", "--initial-branch=master", "--object-format="+r.at.format())
	if err != nil {
		return errors.Join(err, root.RemoveAll(begun))
	}
	durable.At(layout.PointCacheMountBegun)
	return root.Rename(begun, r.rel)
}

// configure writes the config anew, with the remote's URL if that is not "". A
// checkout leaves the URLs of its submodules in it; and the URL of the remote,
// which may have a password in it, does not stay.
func (r *gitRepo) configure(remote string) error {
	config := "[core]\n\trepositoryformatversion = 0\n\tbare = true\n"
	if r.at.format() != "sha1" {
		config = "[core]\n\trepositoryformatversion = 1\n\tbare = true\n[extensions]\n\tobjectformat = " + r.at.format() + "\n"
	}
	if remote != "" {
		config += fmt.Sprintf("[remote %q]\n\turl = %s\n", gitRemote, gitQuoted(remote))
	}
	return r.failed("configure the kept repository", os.WriteFile(filepath.Join(r.dir, "config"), []byte(config), 0o600))
}

// gitQuoted is a value as a config of git has it.
func gitQuoted(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s) + `"`
}

// failed gives an error of the file system what it lacks.
func (c *gitCommand) failed(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("source %s: failed to %s: %w: %w", c.o.redacted(), what, err, errdefs.ErrUnavailable)
}

// ok runs a command that may fail, and whose errors are nobody's business.
func (r *gitRepo) ok(ctx context.Context, args ...string) bool {
	_, err := r.cli.Run(ctx, args...)
	return err == nil
}

// fetch has what the source names in the repository: by its name, by its ID if
// the name has moved on or there is none, and at last, since not all servers
// give what is asked for by ID, with all of the remote's history.
func (r *gitRepo) fetch(ctx context.Context) error {
	if r.held(ctx) || r.keep(ctx) {
		return nil
	}
	told := r.o.j.progress.part(r.o.v, "fetching "+r.o.redacted(), "fetching")
	defer told.done()
	if !gitutil.IsCommitSHA(r.at.ref) && !r.o.byCommit {
		err := r.take(ctx, "--depth=1", gitRemote, "+"+r.at.ref+":"+gitIncoming)
		if err != nil && !strings.Contains(err.Error(), "couldn't find remote ref") {
			return err
		}
		if r.keep(ctx) {
			return nil
		}
	}
	err := r.take(ctx, "--depth=1", gitRemote, "+"+r.at.id+":"+gitIncoming)
	if r.keep(ctx) {
		return nil
	}
	if !r.o.byCommit {
		err = r.takeAll(ctx)
	}
	if err == nil && !r.keep(ctx) {
		err = fmt.Errorf("source %s: commit %s can not be found in the repository: %w", r.o.redacted(), r.at.id, errdefs.ErrNotFound)
	}
	return err
}

func (r *gitRepo) takeAll(ctx context.Context) error {
	args := []string{"--prune"}
	if _, err := os.Lstat(filepath.Join(r.dir, "shallow")); err == nil {
		args = append(args, "--unshallow")
	}
	return r.take(ctx, append(args, gitRemote, "+refs/heads/*:"+gitAll+"heads/*", "+refs/tags/*:"+gitAll+"tags/*")...)
}

// take fetches. What it has fetched is on the disk before a name stands for it.
func (r *gitRepo) take(ctx context.Context, args ...string) error {
	_, err := r.with(gitutil.WithArgs("-c", "core.fsync=committed,reference", "-c", "fetch.unpackLimit=1")).
		remote(ctx, "fetch remote", append([]string{"fetch", "--no-tags", "--no-recurse-submodules"}, args...)...)
	return err
}

// keep holds the commit under a name, if all of it is here: a fetch that was
// broken off may have left a part.
func (r *gitRepo) keep(ctx context.Context) bool {
	return r.whole(ctx) && r.ok(ctx, "update-ref", gitHeld+r.at.id, r.at.id)
}

// objects adds the commit, and the tag if it has one, to what is told of the
// source.
func (r *gitRepo) objects(ctx context.Context, m *sourceresolver.ResolveGitResponse) error {
	kind, err := r.run(ctx, "read the commit", "cat-file", "-t", r.at.id)
	if err != nil {
		return err
	}
	commit := r.at.id
	m.CommitChecksum = ""
	switch kind = strings.TrimSpace(kind); kind {
	case "commit":
	case "tag":
		tag, err := r.run(ctx, "read the tag", "cat-file", "tag", r.at.id)
		if err != nil {
			return err
		}
		if commit, err = r.run(ctx, "read the tag", "rev-parse", r.at.id+"^{commit}"); err != nil {
			return err
		}
		commit = strings.TrimSpace(commit)
		m.TagObject, m.CommitChecksum = []byte(tag), commit
	default:
		return fmt.Errorf("source %s: expected commit or tag object, got %s: %w", r.o.redacted(), kind, errdefs.ErrFailedPrecondition)
	}
	data, err := r.run(ctx, "read the commit", "cat-file", "commit", commit)
	m.CommitObject = []byte(data)
	return err
}
