package gc

import (
	"context"
	"encoding/json"
	"errors"

	ccontent "github.com/containerd/containerd/v2/core/content"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// blobBatch is how many blobs a transaction drops, and blobsLooked how many one
// looks at.
const (
	blobBatch   = 64
	blobsLooked = 5000
)

// dropBlobs removes blobs that can be had again until so many bytes are free, or
// none is left. The images stay whole: their layers are unpacked.
func (c *Collector) dropBlobs(ctx context.Context, bytes int64) (freed int64, err error) {
	defer c.Journal.Kick()
	after, more := layout.BlobDigest(""), true
	layersOf := map[layout.Node]map[layout.BlobDigest]bool{}
	for more && freed < bytes {
		var found map[layout.BlobDigest][]layout.Node
		err := c.DB.View(ctx, func(tx *metadata.Tx) (err error) {
			found, after, more, err = repeatable(tx, after, bytes-freed)
			return err
		})
		if err != nil {
			return freed, err
		}
		var batch []layout.BlobDigest
		for d, manifests := range found {
			if c.isLayer(ctx, layersOf, d, manifests) {
				batch = append(batch, d)
			}
		}
		if len(batch) == 0 {
			continue
		}
		var n int64
		err = c.DB.Update(ctx, func(tx *metadata.Tx) error {
			n, err = dropAll(tx, batch)
			return err
		})
		if err != nil {
			return freed, err
		}
		freed += n
	}
	return freed, nil
}

// isLayer tells whether all these manifests name a blob as a layer, and not as
// their config, which is small, and which nothing stands in for.
func (c *Collector) isLayer(ctx context.Context, known map[layout.Node]map[layout.BlobDigest]bool, d layout.BlobDigest, manifests []layout.Node) bool {
	for _, m := range manifests {
		layers, ok := known[m]
		if !ok {
			layers = c.layersOf(ctx, m)
			known[m] = layers
		}
		if !layers[d] {
			return false
		}
	}
	return true
}

// layersOf reads the layers of a manifest; none of one that cannot be read.
func (c *Collector) layersOf(ctx context.Context, manifest layout.Node) map[layout.BlobDigest]bool {
	_, id := manifest.Split()
	data, err := ccontent.ReadBlob(ctx, c.Blobs, ocispec.Descriptor{Digest: layout.BlobDigest(id).Digest()})
	var doc ocispec.Manifest
	if err != nil || json.Unmarshal(data, &doc) != nil {
		return nil
	}
	layers := map[layout.BlobDigest]bool{}
	for _, l := range doc.Layers {
		layers[layout.BlobDigest(l.Digest)] = l.Digest != doc.Config.Digest
	}
	return layers
}

// repeatable collects blobs that can be had again, each with its manifests.
func repeatable(tx *metadata.Tx, after layout.BlobDigest, bytes int64) (found map[layout.BlobDigest][]layout.Node, at layout.BlobDigest, more bool, err error) {
	found = map[layout.BlobDigest][]layout.Node{}
	enough := errors.New("enough")
	looked := 0
	at = after
	err = tx.Blobs().EachFrom(string(after), func(d layout.BlobDigest, rec layout.BlobRecord) error {
		if d == after {
			return nil
		}
		if looked++; looked > blobsLooked || len(found) == blobBatch || bytes <= 0 {
			return enough
		}
		at = d
		manifests, err := canBeHadAgain(tx, d, rec)
		if len(manifests) > 0 {
			found[d] = manifests
			bytes -= layout.OnDisk(rec.Size)
		}
		return err
	})
	if errors.Is(err, enough) {
		return found, at, true, nil
	}
	return found, at, false, err
}

// canBeHadAgain returns the manifests that a blob belongs to if a registry has
// it, nobody else holds it, and all of them are unpacked; else none.
func canBeHadAgain(tx *metadata.Tx, d layout.BlobDigest, rec layout.BlobRecord) (manifests []layout.Node, err error) {
	if len(rec.Origins) == 0 {
		return nil, nil
	}
	parents, err := tx.Parents(layout.BlobNode(d))
	for _, e := range parents {
		if e.Rel != layout.RelContent {
			return nil, nil // a lease's, an API's, a layer's list of files, an image's target
		}
		unpacked, err := tx.ChildrenBy(e.Parent, layout.RelUnpacked)
		if err != nil || len(unpacked) == 0 {
			return nil, err
		}
		manifests = append(manifests, e.Parent)
	}
	return manifests, err
}

// dropAll removes blobs from what refers to them, if they can still be had
// again.
func dropAll(tx *metadata.Tx, batch []layout.BlobDigest) (freed int64, err error) {
	return freeing(tx, func() error {
		for _, d := range batch {
			rec, err := tx.Blobs().Get(d)
			if errors.Is(err, errdefs.ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			manifests, err := canBeHadAgain(tx, d, rec)
			if err == nil && len(manifests) > 0 {
				err = tx.Drop(layout.BlobNode(d))
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}
