package builder

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/gitutil"
	"github.com/moby/buildkit/util/sshutil"
	"github.com/moby/buildkit/util/urlutil"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// gitOrigin is one commit of a git repository, as files.
type gitOrigin struct {
	j        *job
	v        *vertex
	remote   string // URL, which may have credentials in it
	ref      string // "": the branch that the repository's HEAD names
	subdir   string // "" for all of it
	checksum string // how the ID of the commit, or of the tag, has to begin
	byCommit bool   // checksum is taken for what ref names, without asking

	keepDir, noSubmodules, advice bool
	mtime                         string // "commit", or the time of the checkout

	header, token string // secrets to authenticate with over HTTP
	agent         string // of the client, for ssh; "": none
	knownHosts    string // what ssh accepts; "": any host

	at *gitAt // after resolve
}

// gitAt is what a repository has under a name.
type gitAt struct {
	ref    string // its full name, or the commit's ID where that was asked for
	id     string // of a commit, or of an annotated tag
	commit string // that the tag names, as far as it is known to be one
}

// format is the kind of hash that the repository's IDs are.
func (a *gitAt) format() string {
	if len(a.id) == 2*sha256.Size {
		return "sha256"
	}
	return "sha1"
}

// mtimeCommit is the attribute that gives all files the commit's time.
const mtimeCommit = "commit"

func newGitOrigin(j *job, v *vertex, op *pb.SourceOp) (*gitOrigin, error) {
	o := &gitOrigin{j: j, v: v}
	u, err := parseGit(strings.TrimPrefix(op.Identifier, schemeGit))
	if err != nil {
		return nil, o.wrong(op.Identifier, err)
	}
	o.remote = u.Remote
	if u.Opts != nil {
		o.ref, o.subdir = u.Opts.Ref, u.Opts.Subdir
	}
	for key, value := range op.Attrs {
		if err := o.set(key, value, u); err != nil {
			return nil, o.wrong(op.Identifier, err)
		}
	}
	return o, o.check()
}

// wrong is an error in what was asked for; one that has a kind keeps it.
func (o *gitOrigin) wrong(source string, err error) error {
	if errdefs.Has(err) {
		return fmt.Errorf("source %s: %w", urlutil.RedactCredentials(source), err)
	}
	return fmt.Errorf("source %s: %w: %w", urlutil.RedactCredentials(source), err, errdefs.ErrInvalidArgument)
}

// parseGit reads an address of a repository; one without a scheme is for https.
func parseGit(s string) (*gitutil.GitURL, error) {
	if !gitutil.IsGitTransport(s) {
		s = "https://" + s
	}
	u, err := gitutil.ParseURL(s)
	if err != nil {
		// What url.Parse says of an address has the address in it.
		return nil, fmt.Errorf("not the address of a git repository")
	}
	return u, nil
}

// set takes one attribute. u is the source's identifier.
func (o *gitOrigin) set(key, value string, u *gitutil.GitURL) (err error) {
	switch key {
	case pb.AttrFullRemoteURL:
		o.remote, err = fullRemote(u, value)
	case pb.AttrKeepGitDir:
		o.keepDir = value == "true"
	case pb.AttrGitSkipSubmodules:
		o.noSubmodules = value == "true"
	case pb.AttrGitAdvice:
		o.advice = value == "true"
	case pb.AttrGitFetchByCommit:
		o.byCommit = value == "true"
	case pb.AttrGitChecksum:
		o.checksum = value
	case pb.AttrGitMTime:
		o.mtime = value
	case pb.AttrAuthHeaderSecret:
		o.header = value
	case pb.AttrAuthTokenSecret:
		o.token = value
	case pb.AttrKnownSSHHosts:
		o.knownHosts = value
	case pb.AttrMountSSHSock:
		o.agent = value
	case pb.AttrGitSignatureVerifyPubKey, pb.AttrGitSignatureVerifyRejectExpired,
		pb.AttrGitSignatureVerifyRequireSignedTag, pb.AttrGitSignatureVerifyIgnoreSignedTag,
		pb.AttrGitBundle, pb.AttrGitCheckoutBundle:
		err = fmt.Errorf("%s is not implemented: %w", key, errdefs.ErrNotImplemented)
	}
	return err
}

var hexDigits = regexp.MustCompile("^[0-9a-fA-F]+$")

func (o *gitOrigin) check() error {
	var err error
	switch {
	case strings.HasPrefix(o.ref, "-"):
		err = fmt.Errorf("invalid git ref %q", o.ref)
	case o.checksum != "" && !hexDigits.MatchString(o.checksum):
		err = fmt.Errorf("invalid checksum %s for Git URL, expected hex commit hash", o.checksum)
	case o.byCommit && !gitutil.IsCommitSHA(o.ref) && !gitutil.IsCommitSHA(o.checksum):
		err = fmt.Errorf("fetch-by-commit requires a full commit hash, got %q", o.checksum)
	}
	if err != nil {
		return o.wrong(o.remote, err)
	}
	return nil
}

// fullRemote is the repository that an identifier names, reached as a full URL
// says. Policies on sources judge by the identifier, so the two have to agree
// on the host and on the path.
func fullRemote(id *gitutil.GitURL, full string) (string, error) {
	u, err := parseGit(full)
	if err != nil {
		return "", fmt.Errorf("%s: %w", pb.AttrFullRemoteURL, err)
	}
	repository := func(u *gitutil.GitURL) string { return strings.TrimSuffix(path.Join("/", u.Path), ".git") }
	if !strings.EqualFold(id.Host, u.Host) || repository(id) != repository(u) {
		return "", fmt.Errorf("%s names another repository", pb.AttrFullRemoteURL)
	}
	p := path.Join("/", id.Path)
	if strings.HasPrefix(strings.ToLower(u.Remote), u.Scheme+"://") {
		return (&url.URL{Scheme: u.Scheme, User: u.User, Host: u.Host, Path: p}).String(), nil
	}
	if !strings.HasPrefix(u.Path, "/") {
		p = p[1:] // below the user's home directory
	}
	return (&sshutil.SCPStyleURL{User: u.User, Host: u.Host, Path: p}).String(), nil
}

func (o *gitOrigin) redacted() string { return urlutil.RedactCredentials(o.remote) }

// identify: what the files are depends on the commit alone; what .git holds
// depends on how the commit was named, and where.
func (o *gitOrigin) identify(ctx context.Context) (string, error) {
	at, err := o.resolve(ctx)
	if err != nil {
		return "", err
	}
	k := newKeyHash("git")
	switch {
	case o.keepDir:
		k.add(at.id, at.ref, o.redacted())
	case at.commit != "":
		k.add(at.commit)
	default:
		k.add(at.id)
	}
	k.add(o.subdir, fmt.Sprint(o.keepDir, o.noSubmodules, o.mtime == mtimeCommit))
	return k.sum(), nil
}

func (o *gitOrigin) bring(ctx context.Context, key string) (outputs, error) {
	return o.j.b.flights.do(ctx, key, func() (outputs, error) {
		out, ok, err := o.j.lookup(ctx, key)
		if err != nil || ok {
			return out, err
		}
		t := &step{j: o.j, v: o.v, key: key, began: time.Now()}
		active, tree, err := t.prepare(ctx, "")
		if err != nil {
			return out, err
		}
		err = o.inRepository(ctx, func(r *gitRepo) error { return r.checkout(ctx, tree.Upper) })
		if err != nil {
			t.discard(active)
			return out, err
		}
		return t.commit(ctx, []layout.SnapshotKey{active})
	})
}

// metadata tells what the repository has at the moment, and the objects if
// they are wanted.
func (o *gitOrigin) metadata(ctx context.Context, opt *sourceresolver.ResolveGitOpt) (*sourceresolver.ResolveGitResponse, error) {
	at, err := o.resolve(ctx)
	if err != nil {
		return nil, err
	}
	m := &sourceresolver.ResolveGitResponse{Ref: at.ref, Checksum: at.id, CommitChecksum: at.commit}
	if o.keepDir {
		m.CommitChecksum = "" // .git has the tag
	}
	if opt == nil || !opt.ReturnObject {
		return m, nil
	}
	return m, o.inRepository(ctx, func(r *gitRepo) error { return r.objects(ctx, m) })
}
