package image

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
	"varve.dev/metadata"
)

func mustRef(t *testing.T, s string) Ref {
	t.Helper()
	ref, err := ParseRef(s)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func pull(t *testing.T, o *opened, ref Ref) Pulled {
	t.Helper()
	p, err := o.Pull(t.Context(), ref, PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestPushAndPullBack sends an image to a second repository, where its blobs
// are mounted, and to a second registry, where they are sent; another store
// pulls it from there. A second push sends nothing.
func TestPushAndPullBack(t *testing.T) {
	testkit.NeedRoot(t)
	img := testkit.Awkward(t)
	o, proxy, ref := setup(t, img, "lib/awkward:1")
	pull(t, o, ref)

	other := mustRef(t, proxy.Ref("else/where:2"))
	if err := o.Tag(t.Context(), ref.String(), other); err != nil {
		t.Fatal(err)
	}
	var events eventLog
	if _, err := o.Push(t.Context(), other, PushOptions{Progress: events.add}); err != nil {
		t.Fatal(err)
	}
	if n := proxy.Count(http.MethodPut, ""); n != 1 {
		t.Errorf("%d PUTs, only the manifest's is needed: %q", n, proxy.Requests())
	}

	second := testkit.Registry(t)
	far := mustRef(t, second.Ref("far/away:3"))
	if err := o.Tag(t.Context(), ref.String(), far); err != nil {
		t.Fatal(err)
	}
	if _, err := o.Push(t.Context(), far, PushOptions{}); err != nil {
		t.Fatal(err)
	}
	before := len(proxy.Requests())
	if _, err := o.Push(t.Context(), other, PushOptions{Progress: events.add}); err != nil {
		t.Fatal(err)
	}
	for _, r := range proxy.Requests()[before:] {
		if !strings.HasPrefix(r, http.MethodHead) {
			t.Errorf("the second push asked %q", r)
		}
	}

	// All of it can be had again from where it was pushed to.
	err := o.db.View(t.Context(), func(tx *metadata.Tx) error {
		rec, err := tx.Blobs().Get(layout.BlobDigest(img.Target.Digest))
		if want := []string{ref.Repository(), other.Repository(), far.Repository()}; err == nil && !slices.Equal(rec.Origins, want) {
			t.Errorf("origins %v, want %v", rec.Origins, want)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}

	back := openStore(t, RemoteOptions{})
	if got := pull(t, back, far); got.Target.Digest != img.Target.Digest {
		t.Errorf("pulled back %s, was %s", got.Target.Digest, img.Target.Digest)
	}
}

func TestPushFaults(t *testing.T) {
	testkit.NeedRoot(t)
	img := testkit.Busybox(t)
	o, _, ref := setup(t, img, "lib/busybox:latest")
	pull(t, o, ref)
	second := testkit.Registry(t)
	proxy := testkit.NewProxy(t, second.Addr, nil)
	far := mustRef(t, proxy.Ref("far/busybox:1"))
	if err := o.Tag(t.Context(), ref.String(), far); err != nil {
		t.Fatal(err)
	}
	for _, method := range []string{http.MethodHead, http.MethodPost, http.MethodPut} {
		proxy.SetRule(func(r *http.Request, _ int) testkit.Fault {
			return testkit.Fault{Mute: r.Method == method}
		})
		start := time.Now()
		if _, err := o.Push(t.Context(), far, PushOptions{}); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("%s is not answered: %v", method, err)
		}
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("%s is not answered: took %s", method, took)
		}
	}
	proxy.SetRule(func(r *http.Request, n int) testkit.Fault {
		if r.Method == http.MethodPut && n == 1 {
			return testkit.Fault{Status: http.StatusInternalServerError}
		}
		return testkit.Fault{}
	})
	if _, err := o.Push(t.Context(), far, PushOptions{}); err != nil {
		t.Errorf("one 500: %v", err)
	}
}

// lateWriter takes up a pipe while it is closed: its first closing reaches
// nothing, and nobody reads what is written.
type lateWriter struct {
	content.Writer
	begun, reached chan struct{}
	closings       atomic.Int32
}

func (w *lateWriter) Push(context.Context, ocispec.Descriptor) (content.Writer, error) { return w, nil }

func (w *lateWriter) Status() (content.Status, error) { return content.Status{}, nil }

func (w *lateWriter) Write([]byte) (int, error) {
	close(w.begun)
	<-w.reached
	return 0, io.ErrClosedPipe
}

func (w *lateWriter) Close() error {
	if w.closings.Add(1) == 2 {
		close(w.reached)
	}
	return nil
}

// A push that is called off ends, whatever its writer waits for.
func TestPushEndsWithItsContext(t *testing.T) {
	testkit.NeedRoot(t)
	o, _, ref := setup(t, testkit.Busybox(t), "lib/busybox:latest")
	target := pull(t, o, ref).Target
	w := &lateWriter{begun: make(chan struct{}), reached: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	p := &push{store: o.Store, ref: ref}
	ended := make(chan error, 1)
	go func() { ended <- p.send(ctx, w, target, DefaultPatience()) }()
	<-w.begun
	cancel()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("it ends with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it goes on without its context")
	}
}

// TestTokens pulls and pushes behind the token flow, with credentials from
// docker's config file and from a credential helper.
func TestTokens(t *testing.T) {
	testkit.NeedRoot(t)
	img := testkit.Busybox(t)
	o, proxy, ref := setup(t, img, "lib/busybox:latest")
	proxy.RequireToken("me", "secret")

	if _, err := o.Pull(t.Context(), ref, PullOptions{}); !errors.Is(err, errdefs.ErrPermissionDenied) {
		t.Errorf("anonymous: %v", err)
	}
	o.empty(t)

	basic := t.TempDir()
	auth := base64.StdEncoding.EncodeToString([]byte("me:secret"))
	writeFile(t, filepath.Join(basic, "config.json"), fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, proxy.Addr, auth), 0o600)

	helper := t.TempDir()
	writeFile(t, filepath.Join(helper, "config.json"), fmt.Sprintf(`{"credHelpers":{%q:"varvetest"}}`, proxy.Addr), 0o600)
	writeFile(t, filepath.Join(helper, "docker-credential-varvetest"),
		"#!/bin/sh\ncat >/dev/null\necho '{\"ServerURL\":\"x\",\"Username\":\"me\",\"Secret\":\"secret\"}'\n", 0o755)
	t.Setenv("PATH", helper+":"+os.Getenv("PATH"))

	for name, dir := range map[string]string{"config file": basic, "helper": helper} {
		o := openStore(t, RemoteOptions{Credentials: DockerCredentials(dir)})
		if _, err := o.Pull(t.Context(), ref, PullOptions{}); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		mine := mustRef(t, proxy.Ref("mine/busybox:1"))
		if err := o.Tag(t.Context(), ref.String(), mine); err != nil {
			t.Fatal(err)
		}
		proxy.ExpireTokens()
		if _, err := o.Push(t.Context(), mine, PushOptions{}); err != nil {
			t.Errorf("%s: push: %v", name, err)
		}
	}
	if proxy.TokensIssued() == 0 {
		t.Error("no token was asked for")
	}
}

func writeFile(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// TestMirror goes through a hosts.toml: the first host refuses, the second
// serves.
func TestMirror(t *testing.T) {
	testkit.NeedRoot(t)
	r := testkit.Registry(t)
	r.Push(t, testkit.Busybox(t), "lib/busybox:1")
	down := testkit.NewProxy(t, r.Addr, func(*http.Request, int) testkit.Fault { return testkit.Fault{Status: http.StatusNotFound} })
	hosts := t.TempDir()
	if err := os.Mkdir(filepath.Join(hosts, "images.example"), 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(hosts, "images.example", "hosts.toml"), fmt.Sprintf(
		"server = \"http://%s\"\n[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", r.Addr, down.Addr), 0o644)
	o := openStore(t, RemoteOptions{HostsDir: hosts})
	pull(t, o, mustRef(t, "images.example/lib/busybox:1"))
	if down.Count(http.MethodHead, "") == 0 {
		t.Error("the mirror was not asked")
	}
}

// TestTLS pulls and pushes with a certificate from hosts.toml, through a break
// and a silence, and refuses the certificate without it.
func TestTLS(t *testing.T) {
	testkit.NeedRoot(t)
	r := testkit.Registry(t)
	img := testkit.Busybox(t)
	r.Push(t, img, "lib/busybox:1")
	layer := firstLayer(t, img)
	proxy, ca := testkit.NewTLSProxy(t, r.Addr, func(r *http.Request, n int) testkit.Fault {
		if agent := r.UserAgent(); agent != "varve" {
			t.Errorf("%s %s came from %q", r.Method, r.URL.Path, agent)
		}
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, layer.Digest.String()) {
			return testkit.Fault{}
		}
		switch n {
		case 1:
			return testkit.Fault{Cut: true, CutAt: layer.Size / 3}
		case 2:
			return testkit.Fault{Silent: true, SilentAt: layer.Size / 2}
		}
		return testkit.Fault{}
	})
	configure := func(more string) RemoteOptions {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "images.example"), 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, "images.example", "hosts.toml"), fmt.Sprintf("server = \"https://%s\"\n%s", proxy.Addr, more), 0o644)
		return RemoteOptions{HostsDir: dir}
	}
	o := openStore(t, configure(fmt.Sprintf("ca = %q\n", ca)))
	pull(t, o, mustRef(t, "images.example/lib/busybox:1"))
	if sent := proxy.Sent(layer.Digest.String()); sent > layer.Size+1<<20 {
		t.Errorf("%d bytes were sent of %d", sent, layer.Size)
	}
	to := mustRef(t, "images.example/other/busybox:2")
	if err := o.Tag(t.Context(), "images.example/lib/busybox:1", to); err != nil {
		t.Fatal(err)
	}
	if _, err := o.Push(t.Context(), to, PushOptions{}); err != nil {
		t.Error(err)
	}
	stranger := openStore(t, configure("skip_verify = false\n"))
	if _, err := stranger.Pull(t.Context(), to, PullOptions{}); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an unknown certificate: %v", err)
	}
}

// TestNoRegistry: refused, half open, unknown name.
func TestNoRegistry(t *testing.T) {
	o := openStore(t, RemoteOptions{})
	for name, addr := range map[string]string{"half open": testkit.HalfOpen(t), "refused": "127.0.0.1:1", "unknown": "no-such-host.invalid:80"} {
		start := time.Now()
		_, err := o.Pull(t.Context(), mustRef(t, addr+"/a:b"), PullOptions{})
		if !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), addr) {
			t.Errorf("%s: %v", name, err)
		}
		if took := time.Since(start); took > 12*time.Second {
			t.Errorf("%s: took %s", name, took)
		}
	}
	o.empty(t)
}
