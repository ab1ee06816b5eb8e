package fsck

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/layout"
)

// edgeChecks: E1, E2.
func (c *check) edgeChecks() {
	for e := range c.rec.edges {
		if !c.rec.back[e] {
			c.found("E1", edgeName(e), "", "it is not stored parent first")
		}
	}
	for e := range c.rec.back {
		if !c.rec.edges[e] {
			c.found("E1", edgeName(e), "", "it is not stored child first")
		}
	}
	for e := range c.rec.edges {
		for _, n := range []layout.Node{e.Parent, e.Child} {
			if !c.exists(n) {
				c.found("E2", edgeName(e), "", "%s does not exist", n)
			}
		}
	}
}

func edgeName(e layout.Edge) string {
	return fmt.Sprintf("edge %s -%s-> %s", e.Parent, e.Rel, e.Child)
}

func (c *check) exists(n layout.Node) bool {
	kind, id := n.Split()
	ok := false
	switch kind {
	case layout.KindBlob:
		_, ok = c.rec.blobs[layout.BlobDigest(id)]
	case layout.KindLayer:
		_, ok = c.rec.layers[layout.LayerID(id)]
	case layout.KindSnapshot:
		_, ok = c.rec.snapshots[layout.SnapshotKey(id)]
	case layout.KindImage:
		_, ok = c.rec.images[id]
	case layout.KindContainer:
		_, ok = c.rec.containers[layout.ContainerID(id)]
	case layout.KindLease:
		_, ok = c.rec.leases[layout.LeaseID(id)]
	case layout.KindCache:
		_, ok = c.rec.cache[id]
	case layout.KindIntent:
		_, ok = c.rec.intents[layout.IntentID(id)]
	case layout.KindActive:
		_, err := os.Lstat(c.path(layout.ActivePath(layout.LayerID(id))))
		ok = !errors.Is(err, fs.ErrNotExist)
	case layout.KindAPI:
		ok = n == layout.ContainerdNode
	}
	return ok
}

// referenceChecks: E3, E4, I2, I3.
func (c *check) referenceChecks() {
	for _, e := range c.called() {
		if !c.rec.edges[e] {
			c.found("E3", edgeName(e), "", "the record calls for it and it is not stored")
		}
	}
	held := map[layout.Node]bool{}
	for e := range c.rec.edges {
		held[e.Child] = true
	}
	for _, n := range c.nonRoots() {
		if !held[n] {
			c.found("E4", string(n), "", "nothing refers to it")
		}
	}
	for name, rec := range c.rec.images {
		c.checkDocument(name, rec.Target, maxNesting)
	}
}

// called returns the edges that the records call for.
func (c *check) called() (out []layout.Edge) {
	add := func(parent layout.Node, rel string, child layout.Node) {
		out = append(out, layout.Edge{Parent: parent, Rel: rel, Child: child})
	}
	for key, s := range c.rec.snapshots {
		n := layout.SnapshotNode(key)
		if s.Parent != "" {
			add(n, layout.RelParent, layout.SnapshotNode(s.Parent))
		}
		switch {
		case s.Kind == layout.SnapshotCommitted:
			add(n, layout.RelTree, layout.LayerNode(s.Layer))
		case s.Layer != "":
			add(n, layout.RelTree, layout.ActiveNode(s.Layer))
		}
	}
	for id, l := range c.rec.layers {
		add(layout.LayerNode(id), layout.RelFiles, layout.BlobNode(l.Manifest))
	}
	for name, i := range c.rec.images {
		add(layout.ImageNode(name), layout.RelTarget, layout.BlobNode(layout.BlobDigest(i.Target.Digest)))
	}
	for key, r := range c.rec.cache {
		for _, s := range r.Snapshots {
			add(layout.CacheNode(key), layout.RelResult, layout.SnapshotNode(s))
		}
	}
	for id, r := range c.rec.containers {
		add(layout.ContainerNode(id), layout.RelRootfs, layout.SnapshotNode(r.Snapshot))
	}
	return out
}

func (c *check) nonRoots() (out []layout.Node) {
	for d := range c.rec.blobs {
		out = append(out, layout.BlobNode(d))
	}
	for id := range c.rec.layers {
		out = append(out, layout.LayerNode(id))
	}
	for key := range c.rec.snapshots {
		out = append(out, layout.SnapshotNode(key))
	}
	return out
}

// maxNesting bounds indexes in indexes, maxDocument what is read of one.
const (
	maxNesting  = 4
	maxDocument = 16 << 20
)

// document holds what a manifest and an index have.
type document struct {
	Config    *ocispec.Descriptor  `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	Manifests []ocispec.Descriptor `json:"manifests"`
}

// checkDocument follows an image from its target down (I2, I3). A blob whose
// file is not there or short is the business of B1 and B2.
func (c *check) checkDocument(name string, desc ocispec.Descriptor, depth int) {
	d := layout.BlobDigest(desc.Digest)
	if _, ok := c.rec.blobs[d]; !ok || depth == 0 {
		return
	}
	var doc document
	if !c.readJSON(d, &doc) {
		return
	}
	object := fmt.Sprintf("image %q", name)
	for _, child := range doc.Manifests {
		c.checkDocument(name, child, depth-1)
	}
	if doc.Config == nil {
		return
	}
	if _, ok := c.rec.blobs[layout.BlobDigest(doc.Config.Digest)]; !ok {
		c.found("I2", object, "", "config %s of manifest %s is not recorded", doc.Config.Digest, d)
		return
	}
	top, unpacked := c.unpackedAs(d)
	for _, l := range doc.Layers {
		if _, ok := c.rec.blobs[layout.BlobDigest(l.Digest)]; !ok && !unpacked {
			c.found("I2", object, "", "layer %s of manifest %s is neither recorded nor unpacked", l.Digest, d)
		}
	}
	if unpacked {
		c.checkChain(object, top, layout.BlobDigest(doc.Config.Digest))
	}
}

func (c *check) readJSON(d layout.BlobDigest, into any) bool {
	fi, err := os.Lstat(c.path(layout.BlobPath(d)))
	if err != nil || !fi.Mode().IsRegular() || fi.Size() > maxDocument {
		return false
	}
	data, err := os.ReadFile(c.path(layout.BlobPath(d)))
	return err == nil && json.Unmarshal(data, into) == nil
}

func (c *check) unpackedAs(manifest layout.BlobDigest) (layout.SnapshotKey, bool) {
	for e := range c.rec.edges {
		if e.Rel == layout.RelUnpacked && e.Parent == layout.BlobNode(manifest) {
			_, key := e.Child.Split()
			return layout.SnapshotKey(key), true
		}
	}
	return "", false
}

// checkChain compares the DiffIDs of a chain with those of the config (I3).
func (c *check) checkChain(object string, top layout.SnapshotKey, config layout.BlobDigest) {
	var image ocispec.Image
	if !c.readJSON(config, &image) {
		return
	}
	at := top
	for i := len(image.RootFS.DiffIDs) - 1; i >= 0; i-- {
		snap, ok := c.rec.snapshots[at]
		if !ok {
			c.found("I3", object, "", "snapshot %q has no layer for DiffID %s", top, image.RootFS.DiffIDs[i])
			return
		}
		// A built layer has a DiffID only once it was exported.
		diff := c.rec.layers[snap.Layer].DiffID
		if diff != "" && !strings.EqualFold(string(diff), image.RootFS.DiffIDs[i].String()) {
			c.found("I3", object, "", "snapshot %q has layer %s where the image has %s", at, diff, image.RootFS.DiffIDs[i])
			return
		}
		at = snap.Parent
	}
	if at != "" {
		c.found("I3", object, "", "snapshot %q stands on more layers than the image has", top)
	}
}
