package image

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layer"
)

// dockerImages makes images of docker's manifest.json. Such an archive has no
// image manifests: they are written here, from the layers as they are, so the
// same archive gives the same image each time.
func (l *loader) dockerImages(ctx context.Context, data []byte) (out []Loaded, err error) {
	var items []dockerManifestItem
	if err := json.Unmarshal(data, &items); err != nil {
		return nil, fmt.Errorf("manifest.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	for _, item := range items {
		target, err := l.dockerImage(ctx, item)
		if err != nil {
			return nil, err
		}
		tags := item.RepoTags
		if len(tags) == 0 {
			tags = []string{""}
		}
		for _, tag := range tags {
			name, err := l.nameFor(target.Digest, tag)
			if err != nil {
				return nil, err
			}
			out = append(out, Loaded{name, target})
		}
	}
	return out, nil
}

func (l *loader) dockerImage(ctx context.Context, item dockerManifestItem) (ocispec.Descriptor, error) {
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Layers:    []ocispec.Descriptor{},
	}
	var err error
	if manifest.Config, err = l.dockerConfig(ctx, item.Config); err != nil {
		return ocispec.Descriptor{}, err
	}
	for _, name := range item.Layers {
		desc, ok := l.resolve(name)
		if !ok {
			return ocispec.Descriptor{}, fmt.Errorf("manifest.json names the layer %s, which the archive has not: %w", name, errdefs.ErrNotFound)
		}
		if desc.MediaType, err = l.layerType(ctx, desc); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer %s: %w", name, err)
		}
		manifest.Layers = append(manifest.Layers, desc)
	}
	data, err := json.Marshal(manifest)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("manifest: %w: %w", err, errdefs.ErrInternal)
	}
	return l.addDocument(ctx, ocispec.MediaTypeImageManifest, data)
}

// dockerConfig finds the config, which old archives keep as "<hex>.json" and
// new ones among the blobs.
func (l *loader) dockerConfig(ctx context.Context, name string) (ocispec.Descriptor, error) {
	if data, ok := l.small[name]; ok {
		return l.addDocument(ctx, ocispec.MediaTypeImageConfig, data)
	}
	desc, ok := l.resolve(name)
	if !ok {
		return desc, fmt.Errorf("manifest.json names the config %s, which the archive has not: %w", name, errdefs.ErrNotFound)
	}
	desc.MediaType = ocispec.MediaTypeImageConfig
	return desc, nil
}

func (l *loader) addDocument(ctx context.Context, mediaType string, data []byte) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := l.a.hold(ctx, []digest.Digest{desc.Digest}); err != nil {
		return desc, err
	}
	return desc, l.a.addSmall(ctx, desc, data)
}

// layerType goes by the first bytes, as unpacking does.
func (l *loader) layerType(ctx context.Context, desc ocispec.Descriptor) (string, error) {
	r, done, err := l.a.reader(ctx, desc)
	if err != nil {
		return "", err
	}
	defer func() { _ = done() }() // it was only read
	stream, compression, err := layer.Decompress(r)
	if err != nil {
		return "", err
	}
	defer stream.Close()
	switch compression {
	case layer.Gzip:
		return ocispec.MediaTypeImageLayerGzip, nil
	case layer.Zstd:
		return ocispec.MediaTypeImageLayerZstd, nil
	}
	return ocispec.MediaTypeImageLayer, nil
}
