package testkit

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Epoch is the time of everything that has no better one: fixtures are the
// same bytes whenever they are made.
var Epoch = time.Date(2024, time.February, 29, 12, 0, 0, 0, time.UTC)

// Image is a finished OCI image layout in a folder of its own. Nobody changes
// it; a test that wants to damage something takes a [Image.Copy].
type Image struct {
	Dir    string             // the layout: oci-layout, index.json, blobs/
	Name   string             // for example "busybox:latest"
	Target ocispec.Descriptor // what index.json names: a manifest or an index
}

// Layout writes an OCI image layout.
type Layout struct{ Dir string }

// NewLayout starts a layout in dir, which is made if it is missing.
func NewLayout(dir string) (*Layout, error) {
	if err := os.MkdirAll(filepath.Join(dir, ocispec.ImageBlobsDir, "sha256"), 0o755); err != nil {
		return nil, err
	}
	mark, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return nil, err
	}
	return &Layout{dir}, os.WriteFile(filepath.Join(dir, ocispec.ImageLayoutFile), mark, 0o644)
}

// BlobPath is where the layout in dir keeps a blob.
func BlobPath(dir string, d digest.Digest) string {
	return filepath.Join(dir, ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// AddBlob stores data.
func (l *Layout) AddBlob(mediaType string, data []byte) (ocispec.Descriptor, error) {
	return l.AddStream(mediaType, func(w io.Writer) error {
		_, err := io.Copy(w, bytes.NewReader(data))
		return err
	})
}

// AddStream stores what write produces.
func (l *Layout) AddStream(mediaType string, write func(io.Writer) error) (ocispec.Descriptor, error) {
	f, err := os.CreateTemp(l.Dir, ".blob-*")
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	hash := digest.Canonical.Digester()
	count := &countWriter{}
	if err := write(io.MultiWriter(f, hash.Hash(), count)); err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := f.Chmod(0o444); err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: hash.Digest(), Size: count.n}
	return desc, os.Rename(f.Name(), BlobPath(l.Dir, desc.Digest))
}

// AddJSON stores v as JSON.
func (l *Layout) AddJSON(mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return l.AddBlob(mediaType, data)
}

// AddImage stores a config and a manifest for layers, and returns the
// manifest. What config says of platform, rootfs and history is filled in.
func (l *Layout) AddImage(config ocispec.ImageConfig, layers ...Layer) (ocispec.Descriptor, error) {
	created := Epoch
	img := ocispec.Image{
		Created:  &created,
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config:   config,
		RootFS:   ocispec.RootFS{Type: "layers"},
	}
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Layers:    []ocispec.Descriptor{},
	}
	for _, layer := range layers {
		manifest.Layers = append(manifest.Layers, layer.Descriptor)
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, layer.DiffID)
		img.History = append(img.History, ocispec.History{Created: &created, CreatedBy: layer.CreatedBy})
	}
	img.History = append(img.History, ocispec.History{Created: &created, CreatedBy: "CMD", EmptyLayer: true})
	var err error
	if manifest.Config, err = l.AddJSON(ocispec.MediaTypeImageConfig, img); err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, err := l.AddJSON(ocispec.MediaTypeImageManifest, manifest)
	desc.Platform = &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	return desc, err
}

// AddIndex stores an index over children, each with its platform.
func (l *Layout) AddIndex(children ...ocispec.Descriptor) (ocispec.Descriptor, error) {
	return l.AddJSON(ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: children,
	})
}

// Finish writes index.json, which names target as name, and returns the image.
func (l *Layout) Finish(name string, target ocispec.Descriptor) (Image, error) {
	entry := target
	entry.Annotations = map[string]string{ocispec.AnnotationRefName: name}
	data, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{entry},
	})
	if err != nil {
		return Image{}, err
	}
	return Image{l.Dir, name, target}, os.WriteFile(filepath.Join(l.Dir, ocispec.ImageIndexFile), data, 0o644)
}

// Open reads the layout in dir, as [Layout.Finish] left it.
func Open(dir string) (Image, error) {
	data, err := os.ReadFile(filepath.Join(dir, ocispec.ImageIndexFile))
	if err != nil {
		return Image{}, err
	}
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return Image{}, fmt.Errorf("index.json of %s: %w", dir, err)
	}
	if len(index.Manifests) != 1 {
		return Image{}, fmt.Errorf("index.json of %s names %d images, not one", dir, len(index.Manifests))
	}
	target := index.Manifests[0]
	name := target.Annotations[ocispec.AnnotationRefName]
	target.Annotations = nil
	return Image{dir, name, target}, nil
}

type countWriter struct{ n int64 }

func (c *countWriter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}

// ReadImage returns the manifest and the config of an image, the first where
// it has several.
func ReadImage(t testing.TB, img Image) (m ocispec.Manifest, config ocispec.Image) {
	t.Helper()
	read := func(d digest.Digest, into any) {
		data, err := os.ReadFile(BlobPath(img.Dir, d))
		if err == nil {
			err = json.Unmarshal(data, into)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	target := img.Target
	if target.MediaType == ocispec.MediaTypeImageIndex {
		var index ocispec.Index
		read(target.Digest, &index)
		target = index.Manifests[0]
	}
	read(target.Digest, &m)
	read(m.Config.Digest, &config)
	return m, config
}

// layered makes an image of so many layers of one kind, and keeps it under a
// name of its own.
func layered(name string, how Compression, layers int, fill func(b *LayerBuilder, layer int)) (Image, error) {
	return cached(name, []string{"1"}, func(l *Layout) (Image, error) {
		var stack []Layer
		for i := range layers {
			layer, err := l.AddLayer(how, fmt.Sprintf("layer %d", i), func(b *LayerBuilder) { fill(b, i) })
			if err != nil {
				return Image{}, err
			}
			stack = append(stack, layer)
		}
		manifest, err := l.AddImage(ocispec.ImageConfig{Cmd: []string{"true"}}, stack...)
		if err != nil {
			return Image{}, err
		}
		return l.Finish(name+":latest", manifest)
	})
}

// Archive is the layout as a tar stream, which ends early when it is closed.
func (i Image) Archive() io.ReadCloser {
	r, w := io.Pipe()
	go func() {
		archive := tar.NewWriter(w)
		w.CloseWithError(errors.Join(archive.AddFS(os.DirFS(i.Dir)), archive.Close()))
	}()
	return r
}
