package builder

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/gitutil/gitobject"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"varve.dev/errdefs"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
)

// upstream is a repository on a web server.
type upstream struct {
	t    *testing.T
	dir  string // work tree
	url  string
	auth func(user, password string) bool // nil: everybody
}

// newUpstream serves a repository: by git's own server, or as plain files.
func newUpstream(t *testing.T, format string, smart bool) *upstream {
	u := &upstream{t: t, dir: t.TempDir()}
	u.git("init", "-q", "-b", "trunk", "--object-format="+format)
	u.git("config", "uploadpack.allowAnySHA1InWant", "false")
	serve := http.FileServer(http.Dir(u.dir))
	if smart {
		backend, err := exec.Command("git", "--exec-path").Output()
		if err != nil {
			t.Fatal(err)
		}
		serve = &cgi.Handler{
			Path: filepath.Join(strings.TrimSpace(string(backend)), "git-http-backend"), Dir: u.dir,
			Env: []string{"GIT_PROJECT_ROOT=" + u.dir, "GIT_HTTP_EXPORT_ALL=1"}, InheritEnv: []string{"PATH"}, Stderr: &bytes.Buffer{},
		}
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, ok := r.BasicAuth(); u.auth != nil && !(ok && u.auth(user, password)) {
			w.Header().Set("WWW-Authenticate", "Basic")
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		serve.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	u.url = s.URL + "/.git"
	return u
}

func (u *upstream) git(args ...string) string {
	u.t.Helper()
	cmd := exec.Command("git", append([]string{"-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "protocol.file.allow=always"}, args...)...)
	cmd.Dir = u.dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_COMMITTER_DATE=1000000000 +0000")
	out, err := cmd.CombinedOutput()
	if err != nil {
		u.t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// commit writes a file and commits it.
func (u *upstream) commit(name, content string) (id string) {
	u.t.Helper()
	file := filepath.Join(u.dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		u.t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		u.t.Fatal(err)
	}
	u.git("add", "-A")
	u.git("commit", "-q", "-m", content)
	u.git("update-server-info")
	return u.git("rev-parse", "HEAD")
}

// gitBuilder is a builder that has a store and runs nothing.
func gitBuilder(t *testing.T) *Builder {
	t.Helper()
	s := teststore.New(t)
	return New(Config{Root: s.Root, DB: s.DB, Journal: s.Journal, Blobs: s.Blobs, Snaps: s.Snaps, Scratch: t.TempDir()})
}

// gitJob is a build that has nothing but a place for repositories.
func gitJob(b *Builder, log *bytes.Buffer) *job {
	return &job{b: b, solving: newFlights(), gitNames: map[string]gitAt{}, progress: newProgress(func(s *client.SolveStatus) {
		for _, l := range s.Logs {
			log.Write(l.Data)
		}
	})}
}

func (u *upstream) origin(t *testing.T, j *job, fragment string, attrs ...string) (*gitOrigin, error) {
	t.Helper()
	_, address, _ := strings.Cut(u.url, "://")
	op := &pb.SourceOp{Identifier: schemeGit + address + fragment, Attrs: map[string]string{pb.AttrFullRemoteURL: u.url}}
	for i := 0; i < len(attrs); i += 2 {
		op.Attrs[attrs[i]] = attrs[i+1]
	}
	v := &vertex{digest: digest.FromString(fmt.Sprint(op)), op: &pb.Op{Op: &pb.Op_Source{Source: op}}}
	return newGitOrigin(j, v, op)
}

// checkedOut is what a source has, by name.
func checkedOut(t *testing.T, o *gitOrigin) (string, map[string]string, error) {
	t.Helper()
	dir := t.TempDir()
	if err := o.inRepository(t.Context(), func(r *gitRepo) error { return r.checkout(t.Context(), dir) }); err != nil {
		return dir, nil, err
	}
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, p)
		if err == nil && d.Type().IsRegular() && !strings.HasPrefix(rel, ".git/") {
			data, _ := os.ReadFile(p)
			files[rel] = string(data)
		}
		return err
	})
	return dir, files, err
}

func TestGitCheckout(t *testing.T) {
	for _, format := range []string{"sha1", "sha256"} {
		for _, smart := range []bool{true, false} {
			t.Run(fmt.Sprint(format, " smart ", smart), func(t *testing.T) { testGitCheckout(t, format, smart) })
		}
	}
}

func testGitCheckout(t *testing.T, format string, smart bool) {
	u := newUpstream(t, format, smart)
	first := u.commit("f", "one")
	u.git("tag", "-m", "a tag", "v1")
	middle := u.commit("f", "two")
	u.git("branch", "v1/side") // no place for a name that is a directory elsewhere
	u.commit("sub/deep/g", "g")
	if err := os.Symlink("sub", filepath.Join(u.dir, "link")); err != nil {
		t.Fatal(err)
	}
	last := u.commit("f", "three")
	tag := u.git("rev-parse", "v1")

	var log bytes.Buffer
	b := gitBuilder(t)
	for _, c := range []struct {
		fragment string
		attrs    []string
		f        string // content of the file f
		id       string
		err      error
	}{
		{fragment: "", f: "three", id: last},
		{fragment: "#v1", f: "one", id: tag},
		{fragment: "#refs/tags/v1", f: "one", id: tag, attrs: []string{pb.AttrGitChecksum, first[:8]}},
		{fragment: "#v1", attrs: []string{pb.AttrGitChecksum, middle[:8]}, err: errdefs.ErrFailedPrecondition},
		{fragment: "#v1/side", f: "two", id: middle},
		{fragment: "#" + first, f: "one", id: first},
		{fragment: "#" + tag, f: "one", id: tag},
		{fragment: "#trunk", f: "two", id: middle, attrs: []string{pb.AttrGitFetchByCommit, "true", pb.AttrGitChecksum, middle}},
		{fragment: "#nothing", err: errdefs.ErrNotFound},
		{fragment: "#" + strings.Repeat("0", len(first)), err: errdefs.ErrNotFound},
		{fragment: "#:link/deep", err: errdefs.ErrFailedPrecondition},
		{fragment: "#:none", err: errdefs.ErrNotFound},
	} {
		for _, keep := range []string{"false", "true"} {
			o, err := u.origin(t, gitJob(b, &log), c.fragment, append(c.attrs, pb.AttrKeepGitDir, keep)...)
			if err != nil {
				t.Fatal(err)
			}
			dir, files, err := checkedOut(t, o)
			if fmt.Sprint(kindOf(err)) != fmt.Sprint(c.err) {
				t.Errorf("%s %v: %v", c.fragment, c.attrs, err)
			}
			if c.err != nil {
				continue
			}
			if files["f"] != c.f || o.at.id != c.id {
				t.Errorf("%s %v: got %v of %v", c.fragment, c.attrs, files, o.at)
			}
			if _, err := os.Stat(filepath.Join(dir, ".git")); (err == nil) != (keep == "true") {
				t.Errorf("%s, .git kept %s: %v", c.fragment, keep, err)
			}
			if keep == "true" {
				own := &upstream{t: t, dir: dir}
				if got, status := own.git("rev-parse", "HEAD"), own.git("status", "--porcelain"); got != own.git("rev-parse", c.id+"^{}") || status != "" {
					t.Errorf("%s: .git is at %s, and says %q", c.fragment, got, status)
				}
			}
		}
	}
	o, err := u.origin(t, gitJob(b, &log), "#:sub/deep", pb.AttrGitMTime, mtimeCommit)
	if err != nil {
		t.Fatal(err)
	}
	dir, files, err := checkedOut(t, o)
	if err != nil || len(files) != 1 || files["g"] != "g" {
		t.Errorf("subdirectory: %v %v", files, err)
	}
	for _, name := range []string{".", "g"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.ModTime() != time.Unix(1000000000, 0) {
			t.Errorf("time of %s: %v %v", name, info.ModTime(), err)
		}
	}
}

func kindOf(err error) error {
	for _, kind := range []error{errdefs.ErrNotFound, errdefs.ErrFailedPrecondition, errdefs.ErrUnavailable, errdefs.ErrInvalidArgument, errdefs.ErrNotImplemented} {
		if errors.Is(err, kind) {
			return kind
		}
	}
	return err
}

// A name that moves between the look and the fetch does not move the build.
func TestGitNameMoves(t *testing.T) {
	u := newUpstream(t, "sha1", true)
	want := u.commit("f", "old")
	var log bytes.Buffer
	j := gitJob(gitBuilder(t), &log)
	o, err := u.origin(t, j, "#trunk")
	if err != nil {
		t.Fatal(err)
	}
	m, err := o.metadata(t.Context(), nil)
	if err != nil || m.Checksum != want || m.Ref != "refs/heads/trunk" {
		t.Fatal(m, err)
	}
	u.commit("f", "new")
	again, err := u.origin(t, j, "#trunk", pb.AttrKeepGitDir, "true")
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []*gitOrigin{o, again} {
		if _, files, err := checkedOut(t, o); err != nil || files["f"] != "old" {
			t.Error(files, err)
		}
	}
}

func TestGitObjects(t *testing.T) {
	u := newUpstream(t, "sha1", true)
	first := u.commit("f", "one")
	u.git("tag", "-m", "a tag", "v1")
	u.git("tag", "light")
	tag := u.git("rev-parse", "v1")
	var log bytes.Buffer
	j := gitJob(gitBuilder(t), &log)
	for _, c := range []struct {
		fragment, keep string
		plain, full    sourceresolver.ResolveGitResponse
	}{
		{"#v1", "false", sourceresolver.ResolveGitResponse{Checksum: tag, CommitChecksum: first}, sourceresolver.ResolveGitResponse{CommitChecksum: first, TagObject: []byte("a tag")}},
		{"#v1", "true", sourceresolver.ResolveGitResponse{Checksum: tag}, sourceresolver.ResolveGitResponse{CommitChecksum: first, TagObject: []byte("a tag")}},
		{"#" + tag, "false", sourceresolver.ResolveGitResponse{Checksum: tag}, sourceresolver.ResolveGitResponse{CommitChecksum: first, TagObject: []byte("a tag")}},
		{"#light", "false", sourceresolver.ResolveGitResponse{Checksum: first}, sourceresolver.ResolveGitResponse{}},
		{"", "false", sourceresolver.ResolveGitResponse{Checksum: first}, sourceresolver.ResolveGitResponse{}},
	} {
		o, err := u.origin(t, j, c.fragment, pb.AttrKeepGitDir, c.keep)
		if err != nil {
			t.Fatal(err)
		}
		m, err := o.metadata(t.Context(), nil)
		if err != nil || m.Checksum != c.plain.Checksum || m.CommitChecksum != c.plain.CommitChecksum || m.CommitObject != nil {
			t.Errorf("%s: %+v %v", c.fragment, m, err)
		}
		m, err = o.metadata(t.Context(), &sourceresolver.ResolveGitOpt{ReturnObject: true})
		if err != nil || m.CommitChecksum != c.full.CommitChecksum || !bytes.Contains(m.TagObject, c.full.TagObject) || (m.TagObject == nil) != (c.full.TagObject == nil) {
			t.Errorf("%s: %+v %v", c.fragment, m, err)
		}
		commit, err := gitobject.Parse(m.CommitObject)
		if err == nil {
			err = commit.VerifyChecksum(first)
		}
		if err != nil {
			t.Errorf("%s: commit object: %v", c.fragment, err)
		}
	}
}

// Submodules come with the files; what leads to the kept repository does not.
// One whose URL changes, and whose kept copy is of no use then, is read anew.
func TestGitSubmodules(t *testing.T) {
	one, two := newUpstream(t, "sha1", true), newUpstream(t, "sha1", true)
	one.commit("inner", "of one")
	two.commit("inner", "of two")
	u := newUpstream(t, "sha1", true)
	u.git("submodule", "add", "-q", one.url, "mod")
	first := u.commit("f", "first")
	u.git("submodule", "deinit", "-q", "-f", "mod")
	u.git("rm", "-q", "-f", "mod")
	if err := os.RemoveAll(filepath.Join(u.dir, ".git/modules")); err != nil {
		t.Fatal(err)
	}
	u.git("submodule", "add", "-q", two.url, "mod")
	second := u.commit("f", "second")
	var log bytes.Buffer
	j := gitJob(gitBuilder(t), &log)
	for _, c := range []struct{ fragment, keep, skip, want string }{
		{first, "false", "false", "of one"}, {second, "false", "false", "of two"}, {first, "false", "false", "of one"},
		{second, "true", "false", "of two"}, {first, "false", "true", ""}, {first, "true", "true", ""},
	} {
		o, err := u.origin(t, j, "#"+c.fragment, pb.AttrKeepGitDir, c.keep, pb.AttrGitSkipSubmodules, c.skip)
		if err != nil {
			t.Fatal(err)
		}
		_, files, err := checkedOut(t, o)
		if err != nil || files["mod/inner"] != c.want {
			t.Errorf("%v: %v %v", c, files, err)
		}
		if _, link := files["mod/.git"]; link != (c.keep == "true" && c.want != "") {
			t.Errorf("%v: %v", c, files)
		}
	}
}

// A repository can not have files of the host come in as a submodule.
func TestGitSubmoduleOfHost(t *testing.T) {
	host, u := newUpstream(t, "sha1", true), newUpstream(t, "sha1", true)
	host.commit("secret", "s")
	u.git("submodule", "add", "-q", host.dir, "mod")
	u.commit("f", "one")
	var log bytes.Buffer
	o, err := u.origin(t, gitJob(gitBuilder(t), &log), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, files, err := checkedOut(t, o); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "not allowed") {
		t.Error(files, err)
	}
}

// No secret is in what people see: errors, logs, the command lines of
// processes, and the .git of what is built.
func TestGitSecrets(t *testing.T) {
	const password = "s3cr3t/pass"
	u := newUpstream(t, "sha1", true)
	u.commit("f", "one")
	var locked atomic.Bool
	u.auth = func(user, got string) bool { return got == password && !locked.Load() }
	bare := u.url
	u.url = strings.Replace(u.url, "://", "://someone:s3cr3t%2Fpass@", 1)
	calls := spyOnGit(t)
	var log bytes.Buffer
	j := gitJob(gitBuilder(t), &log)
	o, err := u.origin(t, j, "", pb.AttrKeepGitDir, "true")
	if err != nil {
		t.Fatal(err)
	}
	dir, files, err := checkedOut(t, o)
	if err != nil || files["f"] != "one" {
		t.Fatal(files, err)
	}
	config, err := os.ReadFile(filepath.Join(dir, ".git/config"))
	if err != nil || !strings.Contains(string(config), strings.Replace(bare, "://", "://xxxxx:xxxxx@", 1)) {
		t.Errorf("config: %s %v", config, err)
	}
	locked.Store(true)
	refused, err := u.origin(t, gitJob(j.b, &log), "")
	if err == nil {
		_, _, err = checkedOut(t, refused)
	}
	if !errors.Is(err, errdefs.ErrUnavailable) {
		t.Error(err)
	}
	root := j.b.Root.Path(layout.CacheMountDir)
	if left, err := exec.Command("grep", "-r", "s3cr3t", root).CombinedOutput(); err == nil || len(left) > 0 {
		t.Errorf("on disk: %s", left)
	}
	seen := map[string]string{"command lines": calls(), "log": log.String(), "error": fmt.Sprint(err), "config": string(config)}
	for where, text := range seen {
		if text == "" || strings.Contains(text, "s3cr3t") || strings.Contains(text, "someone") {
			t.Errorf("%s: %s", where, text)
		}
	}
}

// secretClient is a client that has secrets, and no session.
type secretClient struct{ of session.Caller }

func (c secretClient) Caller(context.Context, string) (session.Caller, error) { return c.of, nil }
func (secretClient) ID() string                                               { return "" }

type secretCaller struct {
	session.Caller
	conn *grpc.ClientConn
}

func (c secretCaller) Conn() *grpc.ClientConn                    { return c.conn }
func (secretCaller) Context(ctx context.Context) context.Context { return ctx }

func withSecrets(t *testing.T, values map[string][]byte) Client {
	t.Helper()
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	secretsprovider.FromMap(values).Register(server)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("unix:"+listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return secretClient{secretCaller{conn: conn}}
}

// A token comes from the client: that for the host before that for any.
func TestGitToken(t *testing.T) {
	u := newUpstream(t, "sha1", true)
	u.commit("f", "one")
	u.auth = func(user, got string) bool { return user == "x-access-token" && got == "tok3n" }
	host, err := url.Parse(u.url)
	if err != nil {
		t.Fatal(err)
	}
	calls := spyOnGit(t)
	var log bytes.Buffer
	for _, c := range []struct {
		secrets map[string][]byte
		kind    error
	}{
		{map[string][]byte{"T." + host.Host: []byte("tok3n"), "T": []byte("other"), "H": []byte("basic x")}, nil},
		{map[string][]byte{"T": []byte("tok3n")}, nil},
		{map[string][]byte{"H": []byte("Basic " + base64.StdEncoding.EncodeToString([]byte("x-access-token:tok3n")))}, nil},
		{map[string][]byte{"T": []byte("wrong")}, errdefs.ErrUnavailable},
		{nil, errdefs.ErrUnavailable},
	} {
		j := gitJob(gitBuilder(t), &log)
		j.req.Client = withSecrets(t, c.secrets)
		o, err := u.origin(t, j, "", pb.AttrAuthTokenSecret, "T", pb.AttrAuthHeaderSecret, "H")
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := checkedOut(t, o); !errors.Is(kindOf(err), c.kind) {
			t.Error(c.secrets, err)
		}
	}
	if text := calls(); !strings.Contains(text, gitAuthVar) || strings.Contains(text, "tok3n") {
		t.Error(text)
	}
}

// ssh knows the hosts that the source says, and no keys of this host.
func TestGitOverSSH(t *testing.T) {
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\nfor a; do echo \"$a\"; case $a in UserKnownHostsFile=*) cat ${a#*=};; esac; done >>%s/calls\n", dir)
	if err := os.WriteFile(filepath.Join(dir, "ssh"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	var log bytes.Buffer
	u := &upstream{t: t, url: "ssh://git@example.com/a/b.git"}
	for hosts, want := range map[string]string{"example.com ssh-ed25519 AAAA": "\nexample.com ssh-ed25519 AAAA", "": "UserKnownHostsFile=/dev/null"} {
		o, err := newGitOrigin(gitJob(gitBuilder(t), &log), &vertex{}, &pb.SourceOp{
			Identifier: "git://example.com/a/b.git", Attrs: map[string]string{pb.AttrFullRemoteURL: u.url, pb.AttrKnownSSHHosts: hosts},
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := checkedOut(t, o); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Error(err)
		}
		data, err := os.ReadFile(filepath.Join(dir, "calls"))
		if err != nil || !strings.Contains(string(data), want) || !strings.Contains(string(data), "IdentityFile=none") {
			t.Errorf("known hosts %q: %s %v", hosts, data, err)
		}
		if left, err := os.ReadDir(o.j.b.Scratch); err != nil || len(left) > 0 {
			t.Error(left, err)
		}
		if err := os.Remove(filepath.Join(dir, "calls")); err != nil {
			t.Fatal(err)
		}
	}
	o, err := newGitOrigin(gitJob(gitBuilder(t), &log), &vertex{}, &pb.SourceOp{
		Identifier: "git://example.com/a/b.git", Attrs: map[string]string{pb.AttrFullRemoteURL: u.url, pb.AttrMountSSHSock: "default"},
	})
	if err == nil {
		_, _, err = checkedOut(t, o)
	}
	if !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), `no SSH key "default" forwarded`) {
		t.Error(err)
	}
}

// A kept repository that is damaged is made anew.
func TestGitDamage(t *testing.T) {
	u := newUpstream(t, "sha1", true)
	id := u.commit("f", "one")
	b := gitBuilder(t)
	for _, damage := range []func(repo string) error{
		func(string) error { return nil },
		func(repo string) error { return os.RemoveAll(filepath.Join(repo, "objects/pack")) },
		func(repo string) error { return os.Truncate(filepath.Join(repo, gitHeld+id), 0) },
		func(repo string) error { return os.Remove(filepath.Join(repo, "HEAD")) },
		func(repo string) error { return os.WriteFile(filepath.Join(repo, "index.lock"), nil, 0o600) },
	} {
		repos, err := os.ReadDir(b.Root.Path(layout.CacheMountDir))
		if err != nil || len(repos) > 1 {
			t.Fatal(repos, err)
		}
		for _, r := range repos {
			if err := damage(b.Root.Path(layout.CacheMountPath(r.Name()))); err != nil {
				t.Fatal(err)
			}
		}
		var log bytes.Buffer
		o, err := u.origin(t, gitJob(b, &log), "")
		if err != nil {
			t.Fatal(err)
		}
		if _, files, err := checkedOut(t, o); err != nil || files["f"] != "one" {
			t.Error(files, err)
		}
	}
}

// spyOnGit has every git that is run write its command line down.
func spyOnGit(t *testing.T) (calls func() string) {
	t.Helper()
	git, err := exec.LookPath("git")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\necho \"$@\" >>%s/calls\nexec %s \"$@\"\n", dir, git)
	if err := os.WriteFile(filepath.Join(dir, "git"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func() string {
		data, err := os.ReadFile(filepath.Join(dir, "calls"))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
}

func TestGitRefused(t *testing.T) {
	j := &job{b: New(Config{})}
	for _, c := range []struct {
		identifier string
		attrs      map[string]string
		kind       error
		says       string
	}{
		{"git://example.com/a.git#-x", nil, errdefs.ErrInvalidArgument, "invalid git ref"},
		{"git://example.com/a.git", map[string]string{pb.AttrGitChecksum: "x"}, errdefs.ErrInvalidArgument, "expected hex commit hash"},
		{"git://example.com/a.git", map[string]string{pb.AttrGitFetchByCommit: "true"}, errdefs.ErrInvalidArgument, "full commit hash"},
		{"git://example.com/a.git", map[string]string{pb.AttrFullRemoteURL: "https://u:p@example.com/b.git"}, errdefs.ErrInvalidArgument, "another repository"},
		{"git://example.com/a.git", map[string]string{pb.AttrFullRemoteURL: "file:///etc"}, errdefs.ErrInvalidArgument, ""},
		{"git://example.com/a.git", map[string]string{pb.AttrGitSignatureVerifyPubKey: "k"}, errdefs.ErrNotImplemented, pb.AttrGitSignatureVerifyPubKey},
		{"git://example.com/a.git", map[string]string{pb.AttrGitBundle: "b"}, errdefs.ErrNotImplemented, pb.AttrGitBundle},
	} {
		_, err := newGitOrigin(j, &vertex{}, &pb.SourceOp{Identifier: c.identifier, Attrs: c.attrs})
		if !errors.Is(kindOf(err), c.kind) || !strings.Contains(fmt.Sprint(err), c.says) {
			t.Errorf("%s %v: %v", c.identifier, c.attrs, err)
		}
	}
}

func TestGitFullRemote(t *testing.T) {
	for _, c := range [][3]string{
		{"example.com/a/b.git", "https://u:p@example.com/a/b.git", "https://u:p@example.com/a/b.git"},
		{"example.com/a/b", "https://EXAMPLE.com/x/../a/b.git", "https://EXAMPLE.com/a/b"},
		{"example.com/a/b.git", "ssh://git@example.com/a/b.git", "ssh://git@example.com/a/b.git"},
		{"example.com/a/b.git", "git@example.com:a/b.git", "git@example.com:a/b.git"},
		{"example.com/a/b.git", "git@example.com:/a/b.git", "git@example.com:/a/b.git"},
	} {
		id, err := parseGit(c[0])
		if err != nil {
			t.Fatal(err)
		}
		if got, err := fullRemote(id, c[1]); err != nil || got != c[2] {
			t.Errorf("%s as %s: %s %v", c[0], c[1], got, err)
		}
	}
}

func TestPickRef(t *testing.T) {
	id := func(c string) string { return strings.Repeat(c, 40) }
	listed := strings.Join([]string{
		"ref: refs/heads/main\tHEAD", id("1") + "\tHEAD", id("1") + "\trefs/heads/main", id("2") + "\trefs/heads/both",
		id("3") + "\trefs/tags/both", id("4") + "\trefs/tags/both^{}", id("5") + "\trefs/tags/v1", id("6") + "\trefs/tags/v1^{}",
		id("7") + "\trefs/pull/1/head", id("8") + "\trefs/heads/a/v1", "x\trefs/heads/bad",
	}, "\n")
	for name, want := range map[string]gitAt{
		"":               {"refs/heads/main", id("1"), ""},
		"main":           {"refs/heads/main", id("1"), ""},
		"both":           {"refs/heads/both", id("2"), ""},
		"refs/tags/both": {"refs/tags/both", id("3"), id("4")},
		"tags/both":      {"refs/tags/both", id("3"), id("4")},
		"v1":             {"refs/tags/v1", id("5"), id("6")},
		"pull/1/head":    {"refs/pull/1/head", id("7"), ""},
		"bad":            {}, "HEAD": {}, "head": {},
	} {
		if got, ok := pickRef(name, listed); got != want || ok != (want.id != "") {
			t.Errorf("%q: %v %v", name, got, ok)
		}
	}
	if at, ok := pickRef("", id("1")+"\tHEAD\n"); ok {
		t.Error("a HEAD that is no branch has a name:", at)
	}
}

func TestGitCredentials(t *testing.T) {
	for remote, want := range map[string][]string{
		"https://example.com/a":         nil,
		"https://token@example.com/a":   {"token", "token"},
		"https://u:p%2Fq@example.com/a": {"u:p%2Fq", "p/q", "p%2Fq"},
		"ssh://git@example.com/a":       nil,
		"git@example.com:a":             nil,
	} {
		if got := credentials(remote); !slices.Equal(got, want) {
			t.Errorf("%s: %q", remote, got)
		}
	}
}
