package image

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
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

// TestSaveAndLoad writes an archive and a folder, and loads each into an empty
// store: same targets, same names.
func TestSaveAndLoad(t *testing.T) {
	testkit.NeedRoot(t)
	o, _, ref := setup(t, testkit.Awkward(t), "lib/awkward:1")
	pull(t, o, ref)
	second := mustRef(t, "example.org/second:x")
	if err := o.Tag(t.Context(), ref.String(), second); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := o.Save(t.Context(), &archive, ref.String(), second.String()); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "layout")
	if err := o.SaveDir(t.Context(), dir, ref.String(), second.String()); err != nil {
		t.Fatal(err)
	}
	want, err := o.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, load := range map[string]func(*opened) ([]Loaded, error){
		"archive": func(o *opened) ([]Loaded, error) {
			return o.Load(t.Context(), bytes.NewReader(archive.Bytes()), LoadOptions{})
		},
		"folder": func(o *opened) ([]Loaded, error) { return o.LoadDir(t.Context(), dir, LoadOptions{}) },
		"docker": func(o *opened) ([]Loaded, error) {
			return o.Load(t.Context(), dockerOnly(t, archive.Bytes()), LoadOptions{})
		},
	} {
		to := openStore(t, RemoteOptions{})
		loaded, err := load(to)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := to.List(t.Context())
		if err != nil || len(loaded) != 2 || len(got) != 1 {
			t.Errorf("%s: loaded %v, listed %v, %v", name, loaded, got, err)
			continue
		}
		if got[0].ID != want[0].ID || strings.Join(got[0].Names, " ") != strings.Join(want[0].Names, " ") || got[0].Err != nil {
			t.Errorf("%s: %+v, was %+v", name, got[0], want[0])
		}
		if to.unpacker.unpacked != 12 {
			t.Errorf("%s: unpacked %d layers", name, to.unpacker.unpacked)
		}
		if left := to.ingests(t); len(left) > 0 {
			t.Errorf("%s: ingests are left: %v", name, left)
		}
	}
}

// dockerOnly leaves out what makes an archive an OCI layout.
func dockerOnly(t *testing.T, archive []byte) io.Reader {
	t.Helper()
	var out bytes.Buffer
	tr, tw := tar.NewReader(bytes.NewReader(archive)), tar.NewWriter(&out)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == ocispec.ImageIndexFile || h.Name == ocispec.ImageLayoutFile {
			continue
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(tw, tr); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return &out
}

// TestLoadOldDockerArchive: config by name, a layer in a folder of its own,
// another that is a link to it, uncompressed.
func TestLoadOldDockerArchive(t *testing.T) {
	testkit.NeedRoot(t)
	layer, err := testkit.Tar(func(b *testkit.LayerBuilder) { b.Text("hello", "world\n") })
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(layer)
	config, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{d, d}},
	})
	if err != nil {
		t.Fatal(err)
	}
	manifest := `[{"Config":"abc.json","RepoTags":["old:1","old:2"],"Layers":["one/layer.tar","two/layer.tar"]}]`
	archive, err := testkit.Tar(func(b *testkit.LayerBuilder) {
		b.Text("one/VERSION", "1.0")
		b.File("one/layer.tar", 0o644, layer)
		b.Text("one/json", "{}")
		b.Symlink("two/layer.tar", "../one/layer.tar")
		b.File("abc.json", 0o644, config)
		b.Text("manifest.json", manifest)
		b.Text("repositories", "{}")
	})
	if err != nil {
		t.Fatal(err)
	}
	o := openStore(t, RemoteOptions{})
	loaded, err := o.Load(t.Context(), bytes.NewReader(archive), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(loaded) != 2 || loaded[0].Name != "docker.io/library/old:1" {
		t.Errorf("loaded %v", loaded)
	}
	details, err := o.Inspect(t.Context(), "old:2")
	if err != nil || details.ID != digest.FromBytes(config) || len(details.Layers) != 2 || details.Layers[1].Digest != d {
		t.Errorf("inspect: %+v, %v", details, err)
	}
}

// TestLoadRefuses: each with one clear error, and nothing left.
func TestLoadRefuses(t *testing.T) {
	testkit.NeedRoot(t)
	good := testkit.Busybox(t)
	broken, err := good.Copy(filepath.Join(t.TempDir(), "broken"))
	if err != nil {
		t.Fatal(err)
	}
	layer := firstLayer(t, good)
	data, err := os.ReadFile(testkit.BlobPath(broken.Dir, layer.Digest))
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	os.Remove(testkit.BlobPath(broken.Dir, layer.Digest))
	writeFile(t, testkit.BlobPath(broken.Dir, layer.Digest), string(data), 0o644)

	missing, err := good.Copy(filepath.Join(t.TempDir(), "missing"))
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(testkit.BlobPath(missing.Dir, layer.Digest))

	o := openStore(t, RemoteOptions{})
	for name, test := range map[string]struct {
		load func() ([]Loaded, error)
		want error
	}{
		"wrong digest":  {func() ([]Loaded, error) { return o.LoadDir(t.Context(), broken.Dir, LoadOptions{}) }, errdefs.ErrFailedPrecondition},
		"missing layer": {func() ([]Loaded, error) { return o.LoadDir(t.Context(), missing.Dir, LoadOptions{}) }, errdefs.ErrNotFound},
		"no folder":     {func() ([]Loaded, error) { return o.LoadDir(t.Context(), "/nowhere", LoadOptions{}) }, errdefs.ErrNotFound},
		"no archive": {func() ([]Loaded, error) {
			return o.Load(t.Context(), strings.NewReader(strings.Repeat("x", 2000)), LoadOptions{})
		}, errdefs.ErrInvalidArgument},
		"empty": {func() ([]Loaded, error) { return o.Load(t.Context(), strings.NewReader(""), LoadOptions{}) }, errdefs.ErrInvalidArgument},
	} {
		if _, err := test.load(); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
		o.empty(t)
		if left := o.ingests(t); len(left) > 0 {
			t.Errorf("%s: ingests are left: %v", name, left)
		}
	}
}

// TestBadManifests: documents that a registry serves with right digests and
// wrong contents.
func TestBadManifests(t *testing.T) {
	testkit.NeedRoot(t)
	r := testkit.Registry(t)
	l, err := testkit.NewLayout(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	layer, err := l.AddLayer(testkit.Gzip, "x", func(b *testkit.LayerBuilder) { b.Text("f", "x") })
	if err != nil {
		t.Fatal(err)
	}
	other := layer
	other.DiffID = digest.FromString("something else")
	odd := layer
	odd.MediaType = "application/x-unheard-of"
	for name, test := range map[string]struct {
		layers []testkit.Layer
		says   string
		want   error
	}{
		"diffid": {[]testkit.Layer{other}, other.DiffID.String(), errdefs.ErrFailedPrecondition},
		"type":   {[]testkit.Layer{odd}, "application/x-unheard-of", errdefs.ErrNotImplemented},
	} {
		target, err := l.AddImage(ocispec.ImageConfig{}, test.layers...)
		if err != nil {
			t.Fatal(err)
		}
		img, err := l.Finish("bad:1", target)
		if err != nil {
			t.Fatal(err)
		}
		ref := mustRef(t, r.Push(t, img, name+":1"))
		o := openStore(t, RemoteOptions{})
		_, err = o.Pull(t.Context(), ref, PullOptions{})
		if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), layer.Digest.String()) {
			t.Errorf("%s: %v", name, err)
		}
		o.empty(t)
	}
}

// TestIndexAndSchema2 pulls a docker manifest list for this platform and
// looks at what is told of it.
func TestIndexAndSchema2(t *testing.T) {
	testkit.NeedRoot(t)
	r := testkit.Registry(t)
	l, err := testkit.NewLayout(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var children []ocispec.Descriptor
	for _, arch := range []string{"s390x", "amd64", "arm64"} {
		children = append(children, schema2(t, l, arch))
	}
	index, err := l.AddJSON(images.MediaTypeDockerSchema2ManifestList, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: images.MediaTypeDockerSchema2ManifestList, Manifests: children,
	})
	if err != nil {
		t.Fatal(err)
	}
	img, err := l.Finish("multi:1", index)
	if err != nil {
		t.Fatal(err)
	}
	ref := mustRef(t, r.Push(t, img, "multi:1"))
	arm, err := ParsePlatform("linux/arm64")
	if err != nil {
		t.Fatal(err)
	}
	o := openStore(t, RemoteOptions{})
	if _, err := o.Pull(t.Context(), ref, PullOptions{Platform: arm}); err != nil {
		t.Fatal(err)
	}
	d, err := o.Inspect(t.Context(), ref.String())
	if err != nil || d.Platform.Architecture != "arm64" || d.Manifest.Digest != children[2].Digest || d.Target.Digest != index.Digest {
		t.Errorf("inspect: %+v, %v", d, err)
	}
	if docker := d.Docker(); docker.Architecture != "arm64" || len(docker.RepoDigests) != 1 || docker.ID != d.ID.String() {
		t.Errorf("docker: %+v", docker)
	}
	mips, err := ParsePlatform("linux/mips64le")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.Pull(t.Context(), ref, PullOptions{Platform: mips}); !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), "linux/s390x") {
		t.Errorf("a platform that is not there: %v", err)
	}
	// Only one of three manifests is here: that one is pushed.
	to := mustRef(t, r.Ref("single:1"))
	if err := o.Tag(t.Context(), ref.String(), to); err != nil {
		t.Fatal(err)
	}
	if pushed, err := o.Push(t.Context(), to, PushOptions{}); err != nil || pushed.Digest != children[2].Digest {
		t.Errorf("pushed %v, %v", pushed, err)
	}
}

func schema2(t *testing.T, l *testkit.Layout, arch string) ocispec.Descriptor {
	t.Helper()
	layer, err := l.AddLayer(testkit.Gzip, "x", func(b *testkit.LayerBuilder) { b.Text("arch", arch) })
	if err != nil {
		t.Fatal(err)
	}
	layer.MediaType = images.MediaTypeDockerSchema2LayerGzip
	config, err := l.AddJSON(images.MediaTypeDockerSchema2Config, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: arch},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.DiffID}},
	})
	if err != nil {
		t.Fatal(err)
	}
	desc, err := l.AddJSON(images.MediaTypeDockerSchema2Manifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: images.MediaTypeDockerSchema2Manifest,
		Config: config, Layers: []ocispec.Descriptor{layer.Descriptor},
	})
	if err != nil {
		t.Fatal(err)
	}
	desc.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
	return desc
}

// TestNames: tag, list, find by id, history, remove.
func TestNames(t *testing.T) {
	testkit.NeedRoot(t)
	o, _, ref := setup(t, testkit.Busybox(t), "lib/busybox:latest")
	got := pull(t, o, ref)
	for _, name := range []string{"short:1", "short:2"} {
		if err := o.Tag(t.Context(), ref.String(), mustRef(t, name)); err != nil {
			t.Fatal(err)
		}
	}
	list, err := o.List(t.Context())
	if err != nil || len(list) != 1 || len(list[0].Names) != 3 || list[0].Size == 0 {
		t.Fatalf("list: %+v, %v", list, err)
	}
	for _, id := range []string{list[0].ID.String(), list[0].ID.Encoded()[:12], got.Target.Digest.Encoded()[:7]} {
		if f, err := o.Find(t.Context(), id); err != nil || f.Target.Digest != got.Target.Digest || len(f.Names) != 3 {
			t.Errorf("find %s: %+v, %v", id, f, err)
		}
	}
	steps, err := o.History(t.Context(), "short:1")
	if err != nil || len(steps) != 2 || !steps[0].EmptyLayer || steps[1].Size == 0 {
		t.Errorf("history: %+v, %v", steps, err)
	}
	if removed, err := o.Remove(t.Context(), "short:1", false); err != nil || removed.Deleted != "" {
		t.Errorf("remove one name: %+v, %v", removed, err)
	}
	if _, err := o.Remove(t.Context(), list[0].ID.Encoded()[:12], false); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("remove an id of two names: %v", err)
	}
	if removed, err := o.Remove(t.Context(), list[0].ID.Encoded()[:12], true); err != nil || len(removed.Untagged) != 2 || removed.Deleted == "" {
		t.Errorf("remove by force: %+v, %v", removed, err)
	}
	o.empty(t)
	if _, err := o.Remove(t.Context(), "short:1", false); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("remove what is gone: %v", err)
	}
	if err := o.journal.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(testPathOf(o, got.Target.Digest)); !os.IsNotExist(err) {
		t.Errorf("the manifest's file is still there: %v", err)
	}
}
