package builder

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/util/gitutil"

	"varve.dev/errdefs"
)

// Names in a kept repository. They are the builder's own, made of IDs, so that
// no name that the remote has or had can be in their way.
const (
	gitHeld     = "refs/varve/held/"    // what was fetched whole, by ID
	gitIncoming = "refs/varve/incoming" // what is being fetched
	gitAll      = "refs/varve/all/"     // the remote's branches and tags
)

// gitRepo is a bare repository that the builder keeps for one remote for as
// long as its process lives, so that a build fetches only what is new. One at
// a time uses it.
type gitRepo struct {
	*gitCommand
	dir string
	at  *gitAt
}

// inRepository runs fn with the source's repository, which has the commit.
func (o *gitOrigin) inRepository(ctx context.Context, fn func(*gitRepo) error) error {
	at, err := o.resolve(ctx)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("git-%s-%x", at.format(), sha256.Sum256([]byte(o.remote)))
	_, err = o.j.b.flights.do(ctx, name, func() (outputs, error) {
		c, err := o.command(ctx)
		if err != nil {
			return outputs{}, err
		}
		defer c.end()
		dir := filepath.Join(o.j.b.Scratch, name)
		r := &gitRepo{gitCommand: c.with(gitutil.WithGitDir(dir)), dir: dir, at: at}
		if err := r.open(ctx, at.format()); err != nil {
			return outputs{}, err
		}
		if err := r.fetch(ctx); err != nil {
			return outputs{}, err
		}
		return outputs{}, fn(r)
	})
	return err
}

// gitLocks are files that a git that was killed leaves behind.
var gitLocks = []string{"shallow.lock", "index.lock", "config.lock", "packed-refs.lock", gitIncoming + ".lock"}

// gitConfig is the config as it was made. It is the last file of a new
// repository to be there.
const gitConfig = "varve-config"

// open makes the repository if it is not there.
func (r *gitRepo) open(ctx context.Context, format string) error {
	if _, err := os.Stat(filepath.Join(r.dir, gitConfig)); errors.Is(err, fs.ErrNotExist) {
		if err := r.create(ctx, format); err != nil {
			return err
		}
	}
	for _, name := range gitLocks {
		_ = os.Remove(filepath.Join(r.dir, name))
	}
	return r.reset()
}

// reset writes the config anew: a checkout leaves the URLs of its submodules
// in it.
func (r *gitRepo) reset() error {
	config, err := os.ReadFile(filepath.Join(r.dir, gitConfig))
	if err == nil {
		err = os.WriteFile(filepath.Join(r.dir, "config"), config, 0o600)
	}
	return r.failed("open the kept repository", err)
}

func (r *gitRepo) create(ctx context.Context, format string) error {
	// Its config has the URL with its credentials.
	if err := errors.Join(os.RemoveAll(r.dir), os.Mkdir(r.dir, 0o700)); err != nil {
		return r.failed("make a repository", err)
	}
	if _, err := r.run(ctx, "make a repository", "init", "--bare", "--template=", "--initial-branch=master", "--object-format="+format); err != nil {
		return err
	}
	config, err := os.ReadFile(filepath.Join(r.dir, "config"))
	if err != nil {
		return r.failed("make a repository", err)
	}
	config = fmt.Appendf(config, "[remote %q]\n\turl = %s\n", gitRemote, gitQuoted(r.o.remote))
	return r.failed("make a repository", os.WriteFile(filepath.Join(r.dir, gitConfig), config, 0o600))
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
	id := r.at.id
	if r.ok(ctx, "show-ref", "--verify", "--quiet", gitHeld+id) || r.keep(ctx) {
		return nil
	}
	told := r.o.j.progress.part(r.o.v, "fetching "+r.o.redacted(), "fetching")
	defer told.done()
	if !gitutil.IsCommitSHA(r.at.ref) && !r.o.byCommit {
		_, err := r.run(ctx, "fetch remote", "fetch", "--depth=1", "--no-tags", gitRemote, "+"+r.at.ref+":"+gitIncoming)
		if err != nil && !strings.Contains(err.Error(), "couldn't find remote ref") {
			return err
		}
		if r.keep(ctx) {
			return nil
		}
	}
	_, err := r.run(ctx, "fetch remote", "fetch", "--depth=1", "--no-tags", gitRemote, "+"+id+":"+gitIncoming)
	if r.keep(ctx) {
		return nil
	}
	if !r.o.byCommit {
		err = r.fetchAll(ctx)
	}
	if err == nil && !r.keep(ctx) {
		err = fmt.Errorf("source %s: commit %s can not be found in the repository: %w", r.o.redacted(), id, errdefs.ErrNotFound)
	}
	return err
}

func (r *gitRepo) fetchAll(ctx context.Context) error {
	args := []string{"fetch", "--no-tags", "--prune"}
	if _, err := os.Lstat(filepath.Join(r.dir, "shallow")); err == nil {
		args = append(args, "--unshallow")
	}
	args = append(args, gitRemote, "+refs/heads/*:"+gitAll+"heads/*", "+refs/tags/*:"+gitAll+"tags/*")
	_, err := r.run(ctx, "fetch remote", args...)
	return err
}

// keep holds the commit under a name, if all of it is here: a fetch that was
// broken off may have left a part.
func (r *gitRepo) keep(ctx context.Context) bool {
	return r.ok(ctx, "rev-list", "--objects", "--quiet", "--max-count=1", r.at.id+"^{commit}", "--") &&
		r.ok(ctx, "update-ref", gitHeld+r.at.id, r.at.id)
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
