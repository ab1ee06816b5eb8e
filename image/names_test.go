package image

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

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
	pinned := ref.WithDigest(got.Target.Digest).String()
	if f, err := o.Find(t.Context(), pinned); err != nil || f.Target.Digest != got.Target.Digest {
		t.Errorf("find %s: %+v, %v", pinned, f, err)
	}
	if _, err := o.Find(t.Context(), ref.WithDigest(digest.FromString("another")).String()); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("find another digest: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = o.each(ctx, func(string, layout.ImageRecord) error {
		cancel() // from here on nothing can be read, which says nothing of the images
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("called off while looking: %v", err)
	}
	steps, err := o.History(t.Context(), "short:1")
	if err != nil || len(steps) != 2 || !steps[0].EmptyLayer || steps[1].Size == 0 {
		t.Errorf("history: %+v, %v", steps, err)
	}
	if removed, err := o.Remove(t.Context(), "short:1", false); err != nil || len(removed.Targets) != 0 {
		t.Errorf("remove one name: %+v, %v", removed, err)
	}
	if _, err := o.Remove(t.Context(), list[0].ID.Encoded()[:12], false); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("remove an id of two names: %v", err)
	}
	if removed, err := o.Remove(t.Context(), list[0].ID.Encoded()[:12], true); err != nil || len(removed.Untagged) != 2 || len(removed.Targets) == 0 {
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
