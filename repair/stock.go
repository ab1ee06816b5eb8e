package repair

import (
	"context"
	"encoding/json"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/layout"
	"varve.dev/metadata"
)

// stock is what the store's documents say of its blobs and layers.
type stock struct {
	blobs  map[layout.BlobDigest]layout.BlobRecord
	layers map[layout.LayerID]layout.LayerRecord
	desc   map[layout.BlobDigest]ocispec.Descriptor  // as whatever refers to it has it
	images map[layout.BlobDigest][]string            // names of those that need a blob
	parent map[layout.BlobDigest][]layout.BlobDigest // manifests of a layer's blob
	ofDiff map[layout.DiffID][]layout.BlobDigest     // blobs that a layer was unpacked from
	diffOf map[layout.ChainID]layout.DiffID          // the top layer of a chain
	origin map[string][]string                       // where blobs of an image came from, by its name
}

// maxDocument bounds what is read of a manifest or config.
const maxDocument = 16 << 20

// maxNesting bounds indexes in indexes.
const maxNesting = 4

// takeStock reads the records and every image's documents. One that is damaged
// tells nothing.
func (r *Repairer) takeStock(ctx context.Context) (*stock, error) {
	s := &stock{
		blobs: map[layout.BlobDigest]layout.BlobRecord{}, layers: map[layout.LayerID]layout.LayerRecord{},
		desc: map[layout.BlobDigest]ocispec.Descriptor{}, images: map[layout.BlobDigest][]string{},
		parent: map[layout.BlobDigest][]layout.BlobDigest{}, ofDiff: map[layout.DiffID][]layout.BlobDigest{},
		diffOf: map[layout.ChainID]layout.DiffID{}, origin: map[string][]string{},
	}
	targets := map[string]ocispec.Descriptor{}
	err := r.DB.View(ctx, func(tx *metadata.Tx) error {
		for _, err := range []error{
			tx.Blobs().Each("", func(d layout.BlobDigest, b layout.BlobRecord) error { s.blobs[d] = b; return nil }),
			tx.Layers().Each("", func(id layout.LayerID, l layout.LayerRecord) error { s.layers[id] = l; return nil }),
			tx.Images().Each("", func(name string, i layout.ImageRecord) error { targets[name] = i.Target; return nil }),
		} {
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for name, target := range targets {
		s.follow(ctx, r, name, target, maxNesting)
	}
	return s, nil
}

// document holds what an index and a manifest have.
type document struct {
	Config    *ocispec.Descriptor  `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	Manifests []ocispec.Descriptor `json:"manifests"`
}

// follow notes what the image name needs, from desc down.
func (s *stock) follow(ctx context.Context, r *Repairer, name string, desc ocispec.Descriptor, depth int) {
	d := layout.BlobDigest(desc.Digest)
	s.need(name, desc)
	var doc document
	if depth == 0 || !r.readJSON(ctx, d, &doc) {
		return
	}
	for _, child := range doc.Manifests {
		if _, fetched := s.blobs[layout.BlobDigest(child.Digest)]; fetched {
			s.follow(ctx, r, name, child, depth-1)
		}
	}
	if doc.Config == nil {
		return
	}
	s.need(name, *doc.Config)
	var config ocispec.Image
	r.readJSON(ctx, layout.BlobDigest(doc.Config.Digest), &config)
	for i, chain := range identity.ChainIDs(slices.Clone(config.RootFS.DiffIDs)) {
		s.diffOf[layout.ChainID(chain)] = layout.DiffID(config.RootFS.DiffIDs[i])
	}
	for i, l := range doc.Layers {
		blob := layout.BlobDigest(l.Digest)
		s.need(name, l)
		if !slices.Contains(s.parent[blob], d) {
			s.parent[blob] = append(s.parent[blob], d)
		}
		if len(config.RootFS.DiffIDs) != len(doc.Layers) {
			continue
		}
		if diff := layout.DiffID(config.RootFS.DiffIDs[i]); !slices.Contains(s.ofDiff[diff], blob) {
			s.ofDiff[diff] = append(s.ofDiff[diff], blob)
		}
	}
}

func (s *stock) need(name string, desc ocispec.Descriptor) {
	d := layout.BlobDigest(desc.Digest)
	s.desc[d] = desc
	if !slices.Contains(s.images[d], name) {
		s.images[d] = append(s.images[d], name)
	}
	s.origin[name] = withNew(s.origin[name], s.blobs[d].Origins)
}

// withNew appends what is not there yet, from the end.
func withNew(to, from []string) []string {
	for _, o := range slices.Backward(from) {
		if !slices.Contains(to, o) {
			to = append(to, o)
		}
	}
	return to
}

func (r *Repairer) readJSON(ctx context.Context, d layout.BlobDigest, into any) bool {
	data, err := r.Blobs.ReadBlob(ctx, d, maxDocument)
	return err == nil && json.Unmarshal(data, into) == nil
}

// descriptor returns how a blob is asked for.
func (s *stock) descriptor(d layout.BlobDigest) ocispec.Descriptor {
	desc, ok := s.desc[d]
	if !ok {
		desc = ocispec.Descriptor{MediaType: "application/octet-stream", Digest: digest.Digest(d), Size: s.blobs[d].Size}
	}
	return desc
}

// repositories returns where a blob can be had: where it came from, the newest
// first, then where other blobs of its images did. Where an image has its name
// from is not asked: one that was built here is nobody else's business.
func (s *stock) repositories(d layout.BlobDigest) []string {
	out := withNew(nil, s.blobs[d].Origins)
	for _, name := range s.images[d] {
		for _, o := range s.origin[name] {
			if !slices.Contains(out, o) {
				out = append(out, o)
			}
		}
	}
	return out
}

// blobsOf returns the blobs that a layer can be unpacked from.
func (s *stock) blobsOf(rec layout.LayerRecord) []layout.BlobDigest {
	out := slices.Clone(s.ofDiff[rec.DiffID])
	if rec.Export != nil && !slices.Contains(out, layout.BlobDigest(rec.Export.Digest)) {
		out = append(out, layout.BlobDigest(rec.Export.Digest))
	}
	return out
}

// imagesOn returns the images that stand on a layer.
func (s *stock) imagesOn(rec layout.LayerRecord) (names []string) {
	for _, d := range s.blobsOf(rec) {
		names = append(names, s.images[d]...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}
