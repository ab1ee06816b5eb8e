package builder

import (
	"context"
	"fmt"
	"strings"

	"github.com/moby/buildkit/util/gitutil"

	"varve.dev/errdefs"
)

// resolve finds out which commit the source is.
func (o *gitOrigin) resolve(ctx context.Context) (*gitAt, error) {
	if o.at != nil {
		return o.at, nil
	}
	at, err := o.named(ctx)
	if err != nil {
		return nil, err
	}
	want := strings.ToLower(o.checksum)
	if !strings.HasPrefix(at.id, want) && (at.commit == "" || !strings.HasPrefix(at.commit, want)) {
		got := at.id
		if at.commit != "" {
			got += " or " + at.commit
		}
		return nil, fmt.Errorf("source %s: expected checksum to match %s, got %s: %w", o.redacted(), o.checksum, got, errdefs.ErrFailedPrecondition)
	}
	o.at = &at
	return o.at, nil
}

// named asks the repository, unless the source says it all itself.
func (o *gitOrigin) named(ctx context.Context) (gitAt, error) {
	if gitutil.IsCommitSHA(o.ref) {
		return gitAt{ref: o.ref, id: o.ref}, nil
	}
	if o.byCommit {
		ref := o.ref
		switch {
		case ref == "":
			ref = o.checksum
		case !strings.HasPrefix(ref, "refs/"):
			ref = "refs/heads/" + ref
		}
		return gitAt{ref: ref, id: o.checksum}, nil
	}
	return o.asked(ctx)
}

// asked asks once in a build for each name, so that all of the build sees the
// same commit.
func (o *gitOrigin) asked(ctx context.Context) (at gitAt, err error) {
	j, key := o.j, "git "+o.remote+"#"+o.ref
	_, err = j.solving.do(ctx, key, func() (outputs, error) {
		j.mu.Lock()
		known, ok := j.gitNames[key]
		j.mu.Unlock()
		if at = known; ok {
			return outputs{}, nil
		}
		if at, err = o.ask(ctx); err != nil {
			return outputs{}, err
		}
		j.mu.Lock()
		defer j.mu.Unlock()
		j.gitNames[key] = at
		return outputs{}, nil
	})
	return at, err
}

// ask has the repository list what it has under the name.
func (o *gitOrigin) ask(ctx context.Context) (gitAt, error) {
	c, err := o.command(ctx)
	if err != nil {
		return gitAt{}, err
	}
	defer c.end()
	args := []string{"ls-remote", "--symref", gitRemote, "HEAD"}
	if o.ref != "" {
		args = []string{"ls-remote", "--", gitRemote, o.ref, o.ref + "^{}"}
	}
	out, err := c.remote(ctx, "list the refs", args...)
	if err != nil {
		return gitAt{}, err
	}
	at, ok := pickRef(o.ref, out)
	switch {
	case ok:
		o.j.progress.log(o.v, 1, []byte(at.id+"\t"+at.ref+"\n"))
		return at, nil
	case o.ref == "":
		return at, fmt.Errorf("source %s: could not find the default branch: %w", o.redacted(), errdefs.ErrNotFound)
	}
	return at, fmt.Errorf("source %s: repository does not contain ref %s: %w", o.redacted(), o.ref, errdefs.ErrNotFound)
}

// pickRef finds a name in what `git ls-remote` lists: as it stands, as a branch
// and as a tag, in this order. "" is where HEAD points to.
func pickRef(name, listed string) (gitAt, bool) {
	ids := map[string]string{}
	head := ""
	for line := range strings.Lines(listed) {
		id, ref, _ := strings.Cut(strings.TrimSpace(line), "\t")
		if target, ok := strings.CutPrefix(id, "ref: "); ok && ref == "HEAD" {
			head = target
			continue
		}
		if gitutil.IsCommitSHA(id) {
			ids[ref] = id
		}
	}
	if name == "" {
		return gitAt{ref: head, id: ids["HEAD"]}, strings.HasPrefix(head, "refs/heads/") && ids["HEAD"] != ""
	}
	for _, prefix := range []string{"refs/", "refs/heads/", "refs/tags/"} {
		ref := prefix + strings.TrimPrefix(name, prefix)
		if id := ids[ref]; id != "" {
			return gitAt{ref: ref, id: id, commit: ids[ref+"^{}"]}, true
		}
	}
	return gitAt{}, false
}
