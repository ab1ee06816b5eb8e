package builder

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	ctrcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/labels"
	cachetypes "github.com/moby/buildkit/cache/remotecache/v1/types"
	"github.com/moby/buildkit/session/content"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// The format is BuildKit's (cache/remotecache/v1/types): layers, and records
// with a key each. The keys are varve's own, so that each builder uses what it
// has written and passes over the other's. A record with a result is a result
// under its key; one without, and with one input, is an alias of that.

// inlineKey is where an image's config holds the cache that it was built with.
const inlineKey = "moby.buildkit.cache.v0"

// cacheImport is a cache that is taken from somewhere. It is read when it is first
// asked.
type cacheImport struct {
	option CacheOption
	once   sync.Once
	from   Foreign
	layers []importedLayer
	byKey  map[string]importedRecord
}

type importedLayer struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
	parent int // -1: none
}

type importedRecord struct {
	layer int    // of the result; -1: none
	alias string // of another key; "" for a result
}

// importCaches adds caches that are looked into where the store has nothing.
func (j *job) importCaches(options []CacheOption) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, o := range options {
		id := fmt.Sprint("cache ", o)
		if !j.did[id] {
			j.did[id] = true
			j.imports = append(j.imports, &cacheImport{option: o})
		}
	}
}

// imported looks a key up in the caches that were added.
func (j *job) imported(ctx context.Context, key string) (*cacheImport, importedRecord, bool) {
	j.mu.Lock()
	all := j.imports
	j.mu.Unlock()
	for _, c := range all {
		c.once.Do(func() { j.readCache(ctx, c) })
		if r, ok := c.byKey[key]; ok {
			return c, r, true
		}
	}
	return nil, importedRecord{}, false
}

// readCache reads what a cache has. One that cannot be had is no failure of the
// build, which is told of it.
func (j *job) readCache(ctx context.Context, c *cacheImport) {
	name := c.option.Attrs["ref"]
	if name == "" {
		name = c.option.Type
	}
	v := j.progress.own("importing cache manifest from " + name)
	j.progress.begin(v)
	err := j.openCache(ctx, c)
	j.progress.end(v, err)
}

func (j *job) openCache(ctx context.Context, c *cacheImport) (err error) {
	var target ocispec.Descriptor
	switch c.option.Type {
	case "registry", "inline":
		c.from, target, err = j.req.Images.Origin(ctx, c.option.Attrs["ref"])
	case "local":
		caller, cerr := j.caller(ctx, "")
		if cerr != nil {
			return cerr
		}
		c.from = Foreign{Name: "local cache", Store: content.NewCallerStore(caller, "local:"+c.option.Attrs["src"])}
		target = ocispec.Descriptor{Digest: digest.Digest(c.option.Attrs["digest"])}
		info, ierr := c.from.Store.Info(ctx, target.Digest)
		target.Size, err = info.Size, ierr
	default:
		err = fmt.Errorf("unknown cache importer: %q: %w", c.option.Type, errdefs.ErrNotFound)
	}
	if err != nil {
		return err
	}
	return c.read(ctx, target)
}

// cacheDocument is any of the documents that a cache begins with.
type cacheDocument struct {
	MediaType string               `json:"mediaType"`
	Config    *ocispec.Descriptor  `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	Manifests []ocispec.Descriptor `json:"manifests"`
}

// read reads a cache's manifest or index, or those of images that have theirs
// inline.
func (c *cacheImport) read(ctx context.Context, target ocispec.Descriptor) error {
	c.byKey = map[string]importedRecord{}
	var doc cacheDocument
	if err := c.json(ctx, target, &doc); err != nil {
		return err
	}
	switch {
	case doc.Config != nil && doc.Config.MediaType == cachetypes.CacheConfigMediaTypeV0:
		return c.readConfig(ctx, *doc.Config, doc.Layers)
	case doc.Config != nil:
		return c.readInline(ctx, *doc.Config, doc.Layers)
	}
	var layers []ocispec.Descriptor
	for _, m := range doc.Manifests {
		switch {
		case m.MediaType == cachetypes.CacheConfigMediaTypeV0:
			defer func(m ocispec.Descriptor) { _ = c.readConfig(ctx, m, layers) }(m)
		case images.IsManifestType(m.MediaType):
			var manifest cacheDocument
			if err := c.json(ctx, m, &manifest); err != nil {
				return err
			}
			if manifest.Config != nil && images.IsConfigType(manifest.Config.MediaType) {
				if err := c.readInline(ctx, *manifest.Config, manifest.Layers); err != nil {
					return err
				}
			}
		default:
			layers = append(layers, m)
		}
	}
	return nil
}

func (c *cacheImport) json(ctx context.Context, desc ocispec.Descriptor, into any) error {
	if desc.Size > maxFrontendFile {
		return fmt.Errorf("%s of %s has %d bytes: %w", desc.Digest, c.from.Name, desc.Size, errdefs.ErrResourceExhausted)
	}
	data, err := ctrcontent.ReadBlob(ctx, c.from.Store, desc)
	if err == nil && digest.FromBytes(data) != desc.Digest {
		err = fmt.Errorf("%s of %s is not what its digest says: %w", desc.Digest, c.from.Name, errdefs.ErrDataLoss)
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("%s of %s: %w: %w", desc.Digest, c.from.Name, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// readConfig reads the config of a cache that is kept by itself.
func (c *cacheImport) readConfig(ctx context.Context, desc ocispec.Descriptor, blobs []ocispec.Descriptor) error {
	var config cachetypes.CacheConfig
	if err := c.json(ctx, desc, &config); err != nil {
		return err
	}
	byDigest := map[digest.Digest]ocispec.Descriptor{}
	for _, b := range blobs {
		byDigest[b.Digest] = b
	}
	layers := make([]importedLayer, 0, len(config.Layers))
	for _, l := range config.Layers {
		d, ok := byDigest[l.Blob]
		if !ok || d.Annotations[labels.LabelUncompressed] == "" {
			return fmt.Errorf("cache %s does not describe layer %s: %w", c.from.Name, l.Blob, errdefs.ErrInvalidArgument)
		}
		layers = append(layers, importedLayer{d, digest.Digest(d.Annotations[labels.LabelUncompressed]), l.ParentIndex})
	}
	return c.add(config, layers)
}

// readInline reads the cache in an image's config, if there is one: its layers are
// the image's.
func (c *cacheImport) readInline(ctx context.Context, desc ocispec.Descriptor, blobs []ocispec.Descriptor) error {
	var config struct {
		RootFS ocispec.RootFS `json:"rootfs"`
		Cache  string         `json:"moby.buildkit.cache.v0"`
	}
	if err := c.json(ctx, desc, &config); err != nil || config.Cache == "" {
		return err
	}
	data, err := base64.StdEncoding.DecodeString(config.Cache)
	var cache cachetypes.CacheConfig
	if err == nil {
		err = json.Unmarshal(data, &cache)
	}
	if err != nil || len(config.RootFS.DiffIDs) != len(blobs) {
		return fmt.Errorf("cache in image config %s: %w: %w", desc.Digest, errors.Join(err, errors.New("does not fit")), errdefs.ErrInvalidArgument)
	}
	layers := make([]importedLayer, len(blobs))
	for i, b := range blobs {
		layers[i] = importedLayer{b, config.RootFS.DiffIDs[i], i - 1}
	}
	return c.add(cache, layers)
}

// add takes the records of a config whose layers these are.
func (c *cacheImport) add(config cachetypes.CacheConfig, layers []importedLayer) error {
	base := len(c.layers)
	for i, l := range layers {
		if l.parent >= i {
			return fmt.Errorf("cache %s: layer %d stands on layer %d: %w", c.from.Name, i, l.parent, errdefs.ErrInvalidArgument)
		}
		if l.parent >= 0 {
			l.parent += base
		}
		c.layers = append(c.layers, l)
	}
	for _, r := range config.Records {
		rec := importedRecord{layer: -1}
		switch {
		case len(r.Results) > 0 && r.Results[0].LayerIndex >= 0 && r.Results[0].LayerIndex < len(layers):
			rec.layer = base + r.Results[0].LayerIndex
		case len(r.Inputs) == 1 && len(r.Inputs[0]) == 1 && r.Inputs[0][0].LinkIndex >= 0 && r.Inputs[0][0].LinkIndex < len(config.Records):
			rec.alias = config.Records[r.Inputs[0][0].LinkIndex].Digest.Encoded()
		default:
			continue
		}
		if r.Digest.Validate() == nil {
			c.byKey[r.Digest.Encoded()] = rec
		}
	}
	return nil
}

// fromImports brings a result that an imported cache has under a key into the
// store, and its records.
func (j *job) fromImports(ctx context.Context, key string) (outputs, bool, error) {
	c, rec, ok := j.imported(ctx, key)
	if !ok {
		return outputs{}, false, nil
	}
	if rec.alias != "" {
		_, target, ok := j.imported(ctx, rec.alias)
		if !ok || target.layer < 0 {
			return outputs{}, false, nil
		}
		out, ok, err := j.lookup(ctx, rec.alias)
		if err != nil || !ok {
			return out, ok, err
		}
		return out, true, j.putCache(ctx, key, layout.CacheRecord{Alias: rec.alias, Description: "imported from " + c.from.Name})
	}
	out, err := j.b.flights.do(ctx, "import "+key, func() (outputs, error) {
		if out, ok, err := j.peek(ctx, key); err != nil || ok {
			return out, err
		}
		return j.bringImported(ctx, c, key, rec)
	})
	if err != nil {
		if ctx.Err() != nil {
			return out, false, err
		}
		// What cannot be had is done again.
		v := j.progress.own("failed to get " + key[:12] + " from " + c.from.Name)
		j.progress.end(v, err)
		return outputs{}, false, nil
	}
	return out, true, j.hold(ctx, out.snapshots)
}

func (j *job) putCache(ctx context.Context, key string, rec layout.CacheRecord) error {
	rec.Created = time.Now().UTC()
	rec.LastUse = rec.Created
	return j.b.DB.Update(ctx, func(tx *metadata.Tx) error { return tx.PutCache(key, rec) })
}

// bringImported has the layers of a result pulled: they are an image that nobody
// has named.
func (j *job) bringImported(ctx context.Context, c *cacheImport, key string, rec importedRecord) (outputs, error) {
	var blobs []ocispec.Descriptor
	var diffs []digest.Digest
	for at := rec.layer; at >= 0; at = c.layers[at].parent {
		l := c.layers[at]
		blobs = append([]ocispec.Descriptor{{MediaType: l.desc.MediaType, Digest: l.desc.Digest, Size: l.desc.Size}}, blobs...)
		diffs = append([]digest.Digest{l.diffID}, diffs...)
	}
	docs := &documentStore{InfoReaderProvider: c.from.Store, docs: map[digest.Digest][]byte{}}
	config, err := docs.add(ocispec.MediaTypeImageConfig, ocispec.Image{Platform: j.platform, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffs}})
	if err != nil {
		return outputs{}, err
	}
	manifest, err := docs.add(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: blobs,
	})
	if err != nil {
		return outputs{}, err
	}
	out, err := j.holdImage(ctx, key, func() (layout.SnapshotKey, error) {
		return j.req.Images.SnapshotIn(ctx, Foreign{c.from.Name, docs}, manifest.Digest, j.platform, j.lease.Node())
	})
	if err != nil {
		return out, err
	}
	return out, j.putCache(ctx, key, layout.CacheRecord{Snapshots: out.snapshots, Description: "imported from " + c.from.Name})
}

// documentStore has documents of its own before somebody else's blobs.
type documentStore struct {
	ctrcontent.InfoReaderProvider
	docs map[digest.Digest][]byte
}

func (s *documentStore) add(mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w: %w", mediaType, err, errdefs.ErrInternal)
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	s.docs[desc.Digest] = data
	return desc, nil
}

func (s *documentStore) Info(ctx context.Context, d digest.Digest) (ctrcontent.Info, error) {
	if data, ok := s.docs[d]; ok {
		return ctrcontent.Info{Digest: d, Size: int64(len(data))}, nil
	}
	return s.InfoReaderProvider.Info(ctx, d)
}

func (s *documentStore) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (ctrcontent.ReaderAt, error) {
	if data, ok := s.docs[desc.Digest]; ok {
		return newMemoryBlob(data), nil
	}
	return s.InfoReaderProvider.ReaderAt(ctx, desc)
}
