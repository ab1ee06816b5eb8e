package metadata

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// adopt looks for what the log does not tell of.
func (r *rebuilder) adopt() error {
	unknown := map[layout.BlobDigest]int64{}
	shards, err := os.ReadDir(r.root.Path(layout.BlobsDir + "/sha256"))
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	for _, shard := range shards {
		if !shard.IsDir() {
			continue // B4
		}
		names, err := os.ReadDir(r.root.Path(path.Join(layout.BlobsDir, "sha256", shard.Name())))
		if err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
		}
		for _, n := range names {
			d, err := layout.ParseBlobDigest("sha256:" + n.Name())
			if size, ok := r.size(layout.BlobPath(d)); err == nil && ok {
				if _, known := r.records.blobs[d]; !known {
					unknown[d] = size
				}
			}
		}
	}
	r.adoptImages(unknown)
	for d, size := range unknown {
		r.sweep(layout.BlobNode(d), layout.BlobPath(d), layout.BlobUsage(layout.BlobRecord{Size: size}))
	}
	return errors.Join(
		r.each(layout.LayersDir, func(id string) {
			if _, ok := r.records.layers[layout.LayerID(id)]; !ok {
				r.sweep(layout.LayerNode(layout.LayerID(id)), layout.LayerPath(layout.LayerID(id)), layout.Usage{})
			}
		}),
		r.each(layout.ActiveDir, func(id string) {
			for _, s := range r.records.snapshots {
				if s.Kind != layout.SnapshotCommitted && string(s.Layer) == id {
					return
				}
			}
			r.report.Kept = append(r.report.Kept, layout.ActivePath(layout.LayerID(id)))
		}),
		r.each(layout.ContainersDir, func(id string) {
			if _, ok := r.records.containers[layout.ContainerID(id)]; !ok {
				r.report.Kept = append(r.report.Kept, layout.ContainerPath(layout.ContainerID(id)))
			}
		}),
		r.each(layout.VolumesDir, func(name string) { // no format has had records of volumes
			r.report.Kept = append(r.report.Kept, path.Join(layout.VolumesDir, name))
		}),
	)
}

func (r *rebuilder) each(dir string, fn func(name string)) error {
	entries, err := os.ReadDir(r.root.Path(dir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	for _, e := range entries {
		fn(e.Name())
	}
	return nil
}

func (r *rebuilder) sweep(n layout.Node, path string, usage layout.Usage) {
	r.sweeps = append(r.sweeps, layout.SweepRecord{Path: path, Node: n, Created: r.report.When, Bytes: usage.Bytes, Inodes: usage.Inodes})
}

// maxDocument bounds what is taken for a manifest.
const maxDocument = 4 << 20

// document is what a manifest or an index refers to.
type document struct {
	MediaType string               `json:"mediaType"`
	Config    ocispec.Descriptor   `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	Manifests []ocispec.Descriptor `json:"manifests"`
}

func (d document) children() []ocispec.Descriptor {
	if len(d.Manifests) > 0 {
		return d.Manifests
	}
	return append([]ocispec.Descriptor{d.Config}, d.Layers...)
}

// adoptImages takes up the manifests among unknown blobs that are whole, under
// names that say that they had one.
func (r *rebuilder) adoptImages(unknown map[layout.BlobDigest]int64) {
	docs := map[layout.BlobDigest]document{}
	named := map[layout.BlobDigest]bool{} // by an index
	for d, size := range unknown {
		if doc, ok := r.document(d, size); ok {
			docs[d] = doc
			for _, m := range doc.Manifests {
				named[layout.BlobDigest(m.Digest)] = true
			}
		}
	}
	for d, doc := range docs {
		if named[d] || !r.whole(d, docs, unknown) {
			continue
		}
		name := "<none>@" + string(d)
		if _, ok := r.records.images[name]; ok {
			continue
		}
		r.records.images[name] = layout.ImageRecord{
			Target:  ocispec.Descriptor{MediaType: doc.MediaType, Digest: digest.Digest(d), Size: unknown[d]},
			Created: r.report.When, Updated: r.report.When,
		}
		r.records.edges[layout.Edge{Parent: layout.ImageNode(name), Rel: layout.RelTarget, Child: layout.BlobNode(d)}] = true
		r.report.Kept = append(r.report.Kept, "image "+name)
		r.take(d, docs, unknown)
	}
}

func (r *rebuilder) document(d layout.BlobDigest, size int64) (doc document, ok bool) {
	if size > maxDocument {
		return doc, false
	}
	data, err := os.ReadFile(r.root.Path(layout.BlobPath(d)))
	if err != nil || digest.FromBytes(data) != d.Digest() || !bytes.HasPrefix(bytes.TrimSpace(data), []byte{'{'}) {
		return doc, false
	}
	if json.Unmarshal(data, &doc) != nil {
		return doc, false
	}
	isIndex := strings.Contains(doc.MediaType, "index") || strings.Contains(doc.MediaType, "manifest.list")
	isManifest := strings.Contains(doc.MediaType, "manifest.v") && doc.Config.Digest != ""
	return doc, isIndex && len(doc.Manifests) > 0 || isManifest
}

// whole tells whether all that a manifest needs is there, or one of an
// index's manifests with all that it needs.
func (r *rebuilder) whole(d layout.BlobDigest, docs map[layout.BlobDigest]document, unknown map[layout.BlobDigest]int64) bool {
	doc, ok := docs[d]
	if !ok {
		return r.there(layout.BlobNode(d))
	}
	if len(doc.Manifests) > 0 {
		return slices.ContainsFunc(doc.Manifests, func(m ocispec.Descriptor) bool {
			return r.whole(layout.BlobDigest(m.Digest), docs, unknown)
		})
	}
	for _, c := range doc.children() {
		if size, ok := unknown[layout.BlobDigest(c.Digest)]; !ok && !r.there(layout.BlobNode(layout.BlobDigest(c.Digest))) || ok && size != c.Size {
			return false
		}
	}
	return true
}

// take records an unknown blob and what it refers to.
func (r *rebuilder) take(d layout.BlobDigest, docs map[layout.BlobDigest]document, unknown map[layout.BlobDigest]int64) {
	if size, ok := unknown[d]; ok {
		r.records.blobs[d] = layout.BlobRecord{Size: size, Created: r.report.When, Updated: r.report.When}
		delete(unknown, d)
	}
	doc, ok := docs[d]
	if !ok {
		return
	}
	for _, c := range doc.children() {
		child := layout.BlobDigest(c.Digest)
		if len(doc.Manifests) > 0 && !r.whole(child, docs, unknown) {
			continue // another platform, never fetched
		}
		r.take(child, docs, unknown)
		if r.there(layout.BlobNode(child)) {
			r.records.edges[layout.Edge{Parent: layout.BlobNode(d), Rel: layout.RelContent, Child: layout.BlobNode(child)}] = true
		}
	}
}
