package fsck

import (
	"encoding/json"
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/layout"
)

// maxNesting bounds indexes in indexes, maxDocument what is read of one.
const (
	maxNesting  = 4
	maxDocument = 16 << 20
)

func imageObject(name string) string { return fmt.Sprintf("image %q", name) }

// imageTarget: I1.
func (c *checker) imageTarget(f found) {
	for name, rec := range c.rec.images {
		if !c.exists(layout.BlobNode(layout.BlobDigest(rec.Target.Digest))) {
			f(imageObject(name), "", "its target %s is not recorded", rec.Target.Digest)
		}
	}
}

// document holds what a manifest and an index have.
type document struct {
	Config    *ocispec.Descriptor  `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	Manifests []ocispec.Descriptor `json:"manifests"`
}

// eachManifest calls fn with each recorded manifest that an image leads to,
// once. A blob that is not there or not whole is the business of B1 to B3, a
// manifest of an index that is not recorded was never fetched.
func (c *checker) eachManifest(fn func(object string, d layout.BlobDigest, doc document)) {
	seen := map[layout.BlobDigest]bool{}
	var follow func(object string, d layout.BlobDigest, depth int)
	follow = func(object string, d layout.BlobDigest, depth int) {
		var doc document
		if depth == 0 || seen[d] || !c.readJSON(d, &doc) {
			return
		}
		seen[d] = true
		for _, child := range doc.Manifests {
			follow(object, layout.BlobDigest(child.Digest), depth-1)
		}
		if doc.Config != nil {
			fn(object, d, doc)
		}
	}
	for name, rec := range c.rec.images {
		follow(imageObject(name), layout.BlobDigest(rec.Target.Digest), maxNesting)
	}
}

func (c *checker) readJSON(d layout.BlobDigest, into any) bool {
	if !c.intact(d) {
		return false
	}
	data, err := c.readBlob(d, maxDocument)
	return err == nil && json.Unmarshal(data, into) == nil
}

// unpacked returns the snapshots that manifests were unpacked as.
func (c *checker) unpacked() map[layout.Node][]layout.SnapshotKey {
	out := map[layout.Node][]layout.SnapshotKey{}
	for e := range c.rec.edges {
		if kind, key := e.Child.Split(); e.Rel == layout.RelUnpacked && kind == layout.KindSnapshot {
			out[e.Parent] = append(out[e.Parent], layout.SnapshotKey(key))
		}
	}
	return out
}

// imageContent: I2.
func (c *checker) imageContent(f found) {
	unpacked := c.unpacked()
	c.eachManifest(func(object string, d layout.BlobDigest, doc document) {
		config := layout.BlobDigest(doc.Config.Digest)
		if !c.exists(layout.BlobNode(config)) {
			f(object, "", "config %s of manifest %s is not recorded", config, d)
			return
		}
		if len(unpacked[layout.BlobNode(d)]) > 0 {
			return
		}
		var image ocispec.Image
		known := c.readJSON(config, &image) && len(image.RootFS.DiffIDs) == len(doc.Layers)
		for i, l := range doc.Layers {
			if c.exists(layout.BlobNode(layout.BlobDigest(l.Digest))) {
				continue
			}
			if known && len(c.rec.layerKeys[layout.DiffKey(layout.DiffID(image.RootFS.DiffIDs[i]))]) > 0 {
				continue
			}
			f(object, "", "layer %s of manifest %s is neither recorded nor unpacked", l.Digest, d)
		}
	})
}

// imageChain: I3.
func (c *checker) imageChain(f found) {
	unpacked := c.unpacked()
	c.eachManifest(func(object string, d layout.BlobDigest, doc document) {
		var image ocispec.Image
		if !c.readJSON(layout.BlobDigest(doc.Config.Digest), &image) {
			return
		}
		for _, top := range unpacked[layout.BlobNode(d)] {
			if what := c.compareChain(top, image); what != "" {
				f(object, "", "manifest %s: snapshot %q: %s", d, top, what)
			}
		}
	})
}

// compareChain says where a snapshot's chain is not the one of the image. A
// layer that was built here has no DiffID before it is exported, and one that
// was pulled may have been exported as another stream.
func (c *checker) compareChain(top layout.SnapshotKey, image ocispec.Image) string {
	at := top
	for i := len(image.RootFS.DiffIDs) - 1; i >= 0; i-- {
		want := layout.DiffID(image.RootFS.DiffIDs[i])
		snap, ok := c.rec.snapshots[at]
		if !ok {
			if at != "" {
				return "" // E2, S1 or M1
			}
			return fmt.Sprintf("its chain has no layer for %s", want)
		}
		if l := c.rec.layers[snap.Layer]; l.DiffID != "" && l.DiffID != want && l.ExportDiffID != want {
			return fmt.Sprintf("%q has layer %s where the image has %s", at, l.DiffID, want)
		}
		at = snap.Parent
	}
	if at != "" {
		return "it stands on more layers than the image has"
	}
	return ""
}
