package foreign_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/fsck/foreign"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

func TestCleanLayouts(t *testing.T) {
	for _, img := range []testkit.Image{testkit.Awkward(t), testkit.Stacked(t, 3, 5), nested(t)} {
		before := listed(t, img.Dir)
		report := check(t, foreign.OCILayout, img.Dir)
		wantClean(t, report)
		if report.Images != 1 || report.Blobs < 3 || report.Bytes == 0 {
			t.Errorf("%s: %d images, %d blobs, %d bytes", img.Name, report.Images, report.Blobs, report.Bytes)
		}
		wantUntouched(t, img.Dir, before)
		archive := filepath.Join(t.TempDir(), "layout.tar")
		must(t, os.WriteFile(archive, tarOf(t, img.Dir), 0o600))
		wantClean(t, check(t, foreign.OCILayout, archive))
	}
}

// nested is an image for two platforms, in an index in an index.
func nested(t *testing.T) testkit.Image {
	t.Helper()
	l, err := testkit.NewLayout(t.TempDir())
	must(t, err)
	var platforms []ocispec.Descriptor
	for _, arch := range []string{"amd64", "arm64"} {
		layer, err := l.AddLayer(testkit.Gzip, arch, func(b *testkit.LayerBuilder) { b.Text("arch", arch) })
		must(t, err)
		m, err := l.AddImage(ocispec.ImageConfig{}, layer)
		must(t, err)
		m.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		platforms = append(platforms, m)
	}
	inner, err := l.AddIndex(platforms...)
	must(t, err)
	outer, err := l.AddIndex(inner)
	must(t, err)
	img, err := l.Finish("registry.example/nested:1", outer)
	must(t, err)
	return img
}

// tarOf is a folder as a tar file.
func tarOf(t *testing.T, dir string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	must(t, w.AddFS(os.DirFS(dir)), w.Close())
	return buf.Bytes()
}

// layoutCase does one damage to a copy of an image whose name says which
// registry it is from.
type layoutCase struct {
	name   string
	damage func(t *testing.T, img testkit.Image, m ocispec.Manifest) error
	want   func(img testkit.Image, m ocispec.Manifest) []finding
}

func blobAt(d digest.Digest) string { return "blobs/sha256/" + d.Encoded() }

// onBlob is a case of one file of the layout.
func onBlob(name string, which func(testkit.Image, ocispec.Manifest) string, damage func(string) error, kind foreign.Kind, severity layout.Severity) layoutCase {
	return layoutCase{
		name,
		func(_ *testing.T, img testkit.Image, m ocispec.Manifest) error {
			return damage(filepath.Join(img.Dir, which(img, m)))
		},
		func(img testkit.Image, m ocispec.Manifest) []finding {
			return []finding{{kind, severity, which(img, m)}}
		},
	}
}

var layoutCases = func() (cases []layoutCase) {
	layer := func(_ testkit.Image, m ocispec.Manifest) string { return blobAt(m.Layers[1].Digest) }
	config := func(_ testkit.Image, m ocispec.Manifest) string { return blobAt(m.Config.Digest) }
	manifest := func(img testkit.Image, _ ocispec.Manifest) string { return blobAt(img.Target.Digest) }
	file := func(name string) func(testkit.Image, ocispec.Manifest) string {
		return func(testkit.Image, ocispec.Manifest) string { return name }
	}
	toDir := func(name string) error { return errors.Join(os.Remove(name), os.Mkdir(name, 0o755)) }
	for what, which := range map[string]func(testkit.Image, ocispec.Manifest) string{"layer": layer, "config": config, "manifest": manifest} {
		cases = append(cases,
			onBlob(what+" removed", which, os.Remove, foreign.Missing, layout.Damage),
			onBlob(what+" emptied", which, truncate, foreign.Empty, layout.Damage),
			onBlob(what+" cut short", which, shorten, foreign.Short, layout.Damage),
			onBlob(what+" longer", which, lengthen, foreign.Long, layout.Damage),
			onBlob(what+" flipped", which, flip, foreign.Altered, layout.Damage),
			onBlob(what+" a directory", which, toDir, foreign.Type, layout.Damage))
	}
	cases = append(cases,
		onBlob("mark removed", file("oci-layout"), os.Remove, foreign.Missing, layout.Damage),
		onBlob("mark emptied", file("oci-layout"), truncate, foreign.Empty, layout.Damage),
		onBlob("mark of another version", file("oci-layout"), func(name string) error {
			return os.WriteFile(name, []byte(`{"imageLayoutVersion":"9"}`), 0o644)
		}, foreign.Record, layout.Damage),
		onBlob("index emptied", file("index.json"), truncate, foreign.Empty, layout.Loss),
		layoutCase{"a blob that nothing names", func(_ *testing.T, img testkit.Image, _ ocispec.Manifest) error {
			return os.WriteFile(filepath.Join(img.Dir, "blobs/sha256/stray"), []byte("x"), 0o644)
		}, func(testkit.Image, ocispec.Manifest) []finding {
			return []finding{{foreign.Extra, layout.Notice, "blobs/sha256/stray"}}
		}},
	)
	return cases
}()

func TestDamagedLayouts(t *testing.T) {
	const name = "registry.example/stacked:1"
	for _, c := range layoutCases {
		t.Run(c.name, func(t *testing.T) {
			img, err := testkit.Stacked(t, 3, 5).Copy(t.TempDir())
			must(t, err)
			m, _ := testkit.ReadImage(t, img)
			img, err = (&testkit.Layout{Dir: img.Dir}).Finish(name, img.Target)
			must(t, err, c.damage(t, img, m))
			report := check(t, foreign.OCILayout, img.Dir)
			wantFindings(t, report, c.want(img, m)...)
			for _, f := range report.Findings {
				if strings.HasPrefix(f.Object, "blob ") && (len(f.Images) != 1 || f.Images[0] != name) {
					t.Errorf("%s: images %q", f.Path, f.Images)
				}
			}
		})
	}
}

// What no name says the registry of is lost.
func TestLayoutWithoutRegistry(t *testing.T) {
	img, err := testkit.Stacked(t, 3, 5).Copy(t.TempDir())
	must(t, err)
	m, _ := testkit.ReadImage(t, img)
	at := blobAt(m.Layers[0].Digest)
	must(t, flip(filepath.Join(img.Dir, at)))
	wantFindings(t, check(t, foreign.OCILayout, img.Dir), finding{foreign.Altered, layout.Loss, at})
}

// A blob whose bytes are those of its digest may still be another layer than
// the config says.
func TestLayoutDiffID(t *testing.T) {
	l, err := testkit.NewLayout(t.TempDir())
	must(t, err)
	layer, err := l.AddLayer(testkit.Gzip, "one", func(b *testkit.LayerBuilder) { b.Text("a", "a") })
	must(t, err)
	layer.DiffID = digest.FromString("another")
	m, err := l.AddImage(ocispec.ImageConfig{}, layer)
	must(t, err)
	img, err := l.Finish("diff:1", m)
	must(t, err)
	wantFindings(t, check(t, foreign.OCILayout, img.Dir), finding{foreign.Record, layout.Loss, blobAt(layer.Digest)})
}

// One platform of several may be missing; a notice says so.
func TestLayoutOfOnePlatform(t *testing.T) {
	img := nested(t)
	var index ocispec.Index
	for d := img.Target.Digest; len(index.Manifests) != 2; d = index.Manifests[0].Digest {
		data, err := os.ReadFile(testkit.BlobPath(img.Dir, d))
		must(t, err, json.Unmarshal(data, &index))
	}
	at := blobAt(index.Manifests[1].Digest)
	must(t, os.Remove(filepath.Join(img.Dir, at)))
	wantFindings(t, check(t, foreign.OCILayout, img.Dir), finding{foreign.Missing, layout.Notice, at})
}

// docker's list of images names files by path.
func TestDockerArchiveInLayout(t *testing.T) {
	img, err := testkit.Stacked(t, 3, 5).Copy(t.TempDir())
	must(t, err)
	m, _ := testkit.ReadImage(t, img)
	list := func(layers ...string) {
		data, err := json.Marshal([]map[string]any{{"Config": blobAt(m.Config.Digest), "RepoTags": []string{"stacked:1"}, "Layers": layers}})
		must(t, err, os.WriteFile(filepath.Join(img.Dir, "manifest.json"), data, 0o644))
	}
	a, b, c := blobAt(m.Layers[0].Digest), blobAt(m.Layers[1].Digest), blobAt(m.Layers[2].Digest)
	list(a, b, c)
	wantClean(t, check(t, foreign.OCILayout, img.Dir))
	list(a, b)
	wantFindings(t, check(t, foreign.OCILayout, img.Dir), finding{foreign.Record, layout.Loss, "manifest.json"})
	list(a, c, b)
	wantFindings(t, check(t, foreign.OCILayout, img.Dir), finding{foreign.Record, layout.Loss, b}, finding{foreign.Record, layout.Loss, c})
	list(a, b, "blobs/../../elsewhere")
	wantFindings(t, check(t, foreign.OCILayout, img.Dir), finding{foreign.Record, layout.Loss, "elsewhere"})
	must(t, truncate(filepath.Join(img.Dir, "manifest.json")))
	wantFindings(t, check(t, foreign.OCILayout, img.Dir), finding{foreign.Empty, layout.Damage, "manifest.json"})
}

func TestNoSuchStore(t *testing.T) {
	dir := t.TempDir()
	gz := filepath.Join(dir, "x.tar.gz")
	must(t, os.WriteFile(gz, []byte("\x1f\x8b no tar"), 0o600), os.Mkdir(filepath.Join(dir, "empty"), 0o700))
	for _, c := range []struct {
		engine foreign.Engine
		root   string
		want   error
	}{
		{foreign.OCILayout, filepath.Join(dir, "none"), errdefs.ErrNotFound},
		{foreign.OCILayout, filepath.Join(dir, "empty"), errdefs.ErrNotFound},
		{foreign.OCILayout, gz, errdefs.ErrInvalidArgument},
		{foreign.Docker, filepath.Join(dir, "none"), errdefs.ErrNotFound},
		{foreign.Docker, filepath.Join(dir, "empty"), errdefs.ErrNotFound},
		{foreign.Containerd, filepath.Join(dir, "none"), errdefs.ErrNotFound},
		{foreign.Containerd, filepath.Join(dir, "empty"), errdefs.ErrNotFound},
		{"podman", dir, errdefs.ErrInvalidArgument},
	} {
		report, err := foreign.Run(t.Context(), foreign.Options{Engine: c.engine, Root: c.root})
		if !errors.Is(err, c.want) || report != nil {
			t.Errorf("%s %s: %v, %v", c.engine, c.root, report, err)
		}
	}
}
