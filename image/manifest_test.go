package image

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
)

func TestParseRef(t *testing.T) {
	d := digest.FromString("x").String()
	for in, want := range map[string]string{
		"busybox":                       "docker.io/library/busybox:latest",
		"a/b:c":                         "docker.io/a/b:c",
		"localhost:5000/x":              "localhost:5000/x:latest",
		"reg.example/x/y:1@" + d:        "reg.example/x/y@" + d,
		"docker.io/library/busybox:1.2": "docker.io/library/busybox:1.2",
		"index.docker.io/library/a":     "docker.io/library/a:latest",
	} {
		ref, err := ParseRef(in)
		if err != nil || ref.String() != want {
			t.Errorf("%s: %v, %v, want %s", in, ref, err, want)
		}
	}
	for _, in := range []string{"", "UPPER", "a b", "x:", "-x", "a/b@sha256:12", strings.Repeat("a", 300), strings.Repeat("a", 64)} {
		if _, err := ParseRef(in); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

// blobs is a set of documents by digest.
type blobs map[digest.Digest][]byte

func (b blobs) add(t *testing.T, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(data)
	b[d] = data
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

func (b blobs) read(_ context.Context, desc ocispec.Descriptor, _ int64) ([]byte, error) {
	return b[desc.Digest], nil
}

// TestPickRefuses: each document that cannot be used is named, with the
// reason, and has one kind.
func TestPickRefuses(t *testing.T) {
	b := blobs{}
	config := b.add(t, ocispec.MediaTypeImageConfig, ocispec.Image{})
	layer := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString("l"), Size: 5}
	with := func(change func(*ocispec.Manifest)) ocispec.Descriptor {
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config}
		change(&m)
		return b.add(t, ocispec.MediaTypeImageManifest, m)
	}
	nested := with(func(*ocispec.Manifest) {})
	for range maxNesting + 1 {
		nested = b.add(t, ocispec.MediaTypeImageIndex, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{nested}})
	}
	lying := with(func(*ocispec.Manifest) {})
	lying.Digest = digest.FromString("other")
	b[lying.Digest] = []byte(strings.Repeat(" ", int(lying.Size)))
	short := with(func(m *ocispec.Manifest) { m.Annotations = map[string]string{"a": "b"} })
	short.Size++
	garbage := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("{"), Size: 1}
	b[garbage.Digest] = []byte("{")
	twoFaced := with(func(m *ocispec.Manifest) { m.MediaType = ocispec.MediaTypeImageIndex })

	for name, test := range map[string]struct {
		target ocispec.Descriptor
		want   error
	}{
		"schema 1":        {ocispec.Descriptor{MediaType: images.MediaTypeDockerSchema1Manifest, Digest: config.Digest}, errdefs.ErrNotImplemented},
		"unknown":         {ocispec.Descriptor{MediaType: "application/x-thing", Digest: config.Digest}, errdefs.ErrNotImplemented},
		"too large":       {ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: config.Digest, Size: maxManifest + 1}, errdefs.ErrResourceExhausted},
		"negative":        {ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: config.Digest, Size: -1}, errdefs.ErrInvalidArgument},
		"sha512":          {ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.SHA512.FromString("x")}, errdefs.ErrInvalidArgument},
		"nested":          {nested, errdefs.ErrInvalidArgument},
		"lying":           {lying, errdefs.ErrFailedPrecondition},
		"short":           {short, errdefs.ErrFailedPrecondition},
		"garbage":         {garbage, errdefs.ErrInvalidArgument},
		"two-faced":       {twoFaced, errdefs.ErrInvalidArgument},
		"layers too many": {with(func(m *ocispec.Manifest) { m.Layers = []ocispec.Descriptor{layer} }), errdefs.ErrInvalidArgument},
		"layers way more": {with(func(m *ocispec.Manifest) { m.Layers = make([]ocispec.Descriptor, maxLayers+1) }), errdefs.ErrInvalidArgument},
		"odd config":      {with(func(m *ocispec.Manifest) { m.Config.MediaType = "application/x-helm" }), errdefs.ErrNotImplemented},
		"layer elsewhere": {with(func(m *ocispec.Manifest) {
			l := layer
			l.MediaType = images.MediaTypeDockerSchema2LayerForeignGzip
			m.Layers = []ocispec.Descriptor{l}
		}), errdefs.ErrNotImplemented},
		"layer size":       {with(func(m *ocispec.Manifest) { l := layer; l.Size = -5; m.Layers = []ocispec.Descriptor{l} }), errdefs.ErrInvalidArgument},
		"layer digest":     {with(func(m *ocispec.Manifest) { l := layer; l.Digest = "sha256:../../x"; m.Layers = []ocispec.Descriptor{l} }), errdefs.ErrInvalidArgument},
		"unheard-of layer": {with(func(m *ocispec.Manifest) { l := layer; l.MediaType = "x/y"; m.Layers = []ocispec.Descriptor{l} }), errdefs.ErrNotImplemented},
	} {
		_, err := pick(t.Context(), b.read, test.target, hostPlatform())
		if !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
	if _, err := pick(t.Context(), b.read, with(func(*ocispec.Manifest) {}), hostPlatform()); err != nil {
		t.Errorf("an image without layers: %v", err)
	}
}

// FuzzPick: no document makes it panic.
func FuzzPick(f *testing.F) {
	f.Add([]byte(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[{}]}`), true)
	f.Add([]byte(`{"manifests":[{"platform":{}},{"mediaType":"application/vnd.oci.image.index.v1+json"}]}`), false)
	f.Add([]byte(`{"manifests":[null]}`), false)
	f.Fuzz(func(t *testing.T, data []byte, manifest bool) {
		mediaType := ocispec.MediaTypeImageIndex
		if manifest {
			mediaType = ocispec.MediaTypeImageManifest
		}
		target := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		read := func(context.Context, ocispec.Descriptor, int64) ([]byte, error) { return data, nil }
		p, err := pick(t.Context(), read, target, hostPlatform())
		if err == nil && p.config.Digest == "" {
			t.Error("picked nothing")
		}
	})
}
