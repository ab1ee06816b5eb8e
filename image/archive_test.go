package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
)

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
		if to.unpacker.unpacked.Load() != 12 {
			t.Errorf("%s: unpacked %d layers", name, to.unpacker.unpacked.Load())
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
