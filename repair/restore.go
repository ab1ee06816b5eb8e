package repair

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/fsck/reach"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// A record may be lost while its files and what refers to it are there. Then it
// is made again before anything is dropped for its sake: as the change log has
// it, or from its edges, the index of layers and its files. What only the
// record said is lost then: labels, origins and times.

// restoreEnds makes the records again that an edge leads from and to. The edge is
// dropped only if nothing is left that tells what they were: not because the
// disk was full, or somebody was in a hurry.
func restoreEnds(ctx context.Context, w *work, f fsck.Finding, out *Outcome) error {
	e, err := edgeOf(f.Object)
	if err != nil {
		return err
	}
	w.restoreAll(ctx)
	for _, n := range []layout.Node{e.Child, e.Parent} {
		if err = errors.Join(err, w.restore(ctx, n, out)); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			return err
		}
	}
	if ferr := fixEdge(ctx, w, f, out); ferr != nil {
		return errors.Join(ferr, err)
	}
	return ctx.Err() // whole, or dropped for good
}

// restoreAll makes every lost record again that can be, before the first edge is
// dropped: what one says may be needed for another.
func (w *work) restoreAll(ctx context.Context) {
	for before := -1; before != len(w.restored) && ctx.Err() == nil; {
		before = len(w.restored)
		for _, e := range w.lost {
			_ = w.restore(ctx, e.Child, nil) // said by the step of its edge
			_ = w.restore(ctx, e.Parent, nil)
		}
	}
}

// stands tells whether an edge of a lost record is still there: if not, the
// record was removed since the check.
func (w *work) stands(tx *metadata.Tx, n layout.Node) error {
	for _, e := range w.lost {
		if e.Parent != n && e.Child != n {
			continue
		}
		edges, err := tx.Children(e.Parent)
		if err != nil {
			return err
		}
		if slices.Contains(edges, e) {
			return nil
		}
	}
	return fmt.Errorf("nothing refers to %s any more: %w", n, errdefs.ErrNotFound)
}

// restore makes the record of a node again, if it has none, and notes from what.
// Errors: ErrNotFound if nothing tells what it was.
func (w *work) restore(ctx context.Context, n layout.Node, out *Outcome) error {
	there := false
	err := w.DB.View(ctx, func(tx *metadata.Tx) error {
		there = tx.Exists(n)
		return nil
	})
	if out != nil && w.restored[n] != "" {
		out.From = w.restored[n]
	}
	if err != nil || there {
		return err
	}
	update := func(put func(*metadata.Tx) error, from string) error {
		err := w.DB.Update(ctx, func(tx *metadata.Tx) error {
			if err := w.stands(tx, n); err != nil {
				return err
			}
			return put(tx)
		})
		if err == nil {
			w.restored[n] = from
			if out != nil {
				out.From = from
			}
		}
		return err
	}
	kind, id := n.Split()
	if value := w.logged()[metadata.RecordBucket(kind)][id]; value != nil {
		if err = update(func(tx *metadata.Tx) error { return tx.PutLogged(n, value) }, "the change log"); err == nil {
			return nil
		}
	}
	again := map[string]func(context.Context, string) (func(*metadata.Tx) error, error){
		layout.KindBlob: w.blobAgain, layout.KindLayer: w.layerAgain, layout.KindSnapshot: w.snapshotAgain,
		layout.KindImage: w.imageAgain, layout.KindContainer: w.containerAgain,
	}[kind]
	if again == nil {
		return fmt.Errorf("%s is not recorded: %w", n, errdefs.ErrNotFound)
	}
	put, err := again(ctx, id)
	if err == nil {
		err = update(put, "what refers to it")
	}
	if err != nil {
		return fmt.Errorf("record of %s: %w", n, err)
	}
	return nil
}

func (w *work) blobAgain(ctx context.Context, id string) (func(*metadata.Tx) error, error) {
	d, err := layout.ParseBlobDigest(id)
	if err != nil {
		return nil, err
	}
	fi, err := os.Lstat(w.Root.Path(layout.BlobPath(d)))
	if err != nil || !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("its file is not there: %w", errdefs.ErrNotFound)
	}
	if err := w.hashes(ctx, d); err != nil {
		return nil, err
	}
	now := time.Now().UTC()
	return func(tx *metadata.Tx) error {
		return tx.Blobs().Put(d, layout.BlobRecord{Size: fi.Size(), Created: now, Updated: now})
	}, nil
}

// layerAgain takes the layer's key from the index, the rest from its file
// manifest.
func (w *work) layerAgain(ctx context.Context, id string) (func(*metadata.Tx) error, error) {
	rec := layout.LayerRecord{Created: time.Now().UTC()}
	edges, err := w.children(ctx, layout.LayerNode(layout.LayerID(id)), layout.RelFiles)
	if err != nil {
		return nil, err
	}
	if len(edges) != 1 {
		return nil, fmt.Errorf("it has %d file manifests: %w", len(edges), errdefs.ErrNotFound)
	}
	rec.Manifest = layout.BlobDigest(edges[0])
	t := &treeRepair{work: w, id: layout.LayerID(id), rec: rec}
	files, err := t.manifest(ctx)
	if err != nil {
		return nil, err
	}
	rec.Size, rec.Inodes = files.Usage()
	if fi, err := os.Lstat(w.Root.Path(t.tree())); err != nil || !fi.IsDir() {
		return nil, fmt.Errorf("its tree is not there: %w", errdefs.ErrNotFound)
	}
	return func(tx *metadata.Tx) error {
		key, err := tx.KeyOfLayer(t.id)
		if err != nil {
			return err
		}
		kind, value, _ := strings.Cut(key, ":")
		switch kind {
		case "diff":
			rec.DiffID = layout.DiffID(value)
		case "chain":
			rec.ChainID, rec.DiffID = layout.ChainID(value), w.known.diffOf[layout.ChainID(value)]
		}
		return tx.PutLayer(t.id, rec)
	}, nil
}

func (w *work) snapshotAgain(ctx context.Context, key string) (func(*metadata.Tx) error, error) {
	n := layout.SnapshotNode(layout.SnapshotKey(key))
	parents, err := w.children(ctx, n, layout.RelParent)
	trees, terr := w.childNodes(ctx, n, layout.RelTree)
	if err := errors.Join(err, terr); err != nil {
		return nil, err
	}
	if len(parents) > 1 || len(trees) > 1 || len(parents)+len(trees) == 0 {
		return nil, fmt.Errorf("it has %d parents and %d trees: %w", len(parents), len(trees), errdefs.ErrNotFound)
	}
	now := time.Now().UTC()
	rec := layout.SnapshotRecord{Kind: layout.SnapshotView, Created: now, Updated: now}
	if len(parents) > 0 {
		rec.Parent = layout.SnapshotKey(parents[0])
	}
	if len(trees) > 0 {
		kind, id := trees[0].Split()
		rec.Kind, rec.Layer = layout.SnapshotActive, layout.LayerID(id)
		if kind == layout.KindLayer {
			rec.Kind = layout.SnapshotCommitted
		}
	}
	return func(tx *metadata.Tx) error {
		if rec.Kind == layout.SnapshotCommitted {
			l, err := tx.Layers().Get(rec.Layer)
			if err != nil {
				return err
			}
			rec.Size, rec.Inodes = l.Size, l.Inodes
		}
		return tx.Snapshots().Put(layout.SnapshotKey(key), rec)
	}, nil
}

func (w *work) imageAgain(ctx context.Context, name string) (func(*metadata.Tx) error, error) {
	targets, err := w.children(ctx, layout.ImageNode(name), layout.RelTarget)
	if err != nil {
		return nil, err
	}
	if len(targets) != 1 {
		return nil, fmt.Errorf("it has %d targets: %w", len(targets), errdefs.ErrNotFound)
	}
	d := layout.BlobDigest(targets[0])
	var doc struct {
		document
		MediaType string `json:"mediaType"`
	}
	data, err := w.Blobs.ReadBlob(ctx, d, maxDocument)
	if err == nil {
		err = json.Unmarshal(data, &doc)
	}
	if err != nil {
		return nil, err
	}
	switch {
	case doc.MediaType != "":
	case len(doc.Manifests) > 0:
		doc.MediaType = ocispec.MediaTypeImageIndex
	case doc.Config != nil:
		doc.MediaType = ocispec.MediaTypeImageManifest
	default:
		return nil, fmt.Errorf("blob %s is no manifest and no index: %w", d, errdefs.ErrNotFound)
	}
	now := time.Now().UTC()
	rec := layout.ImageRecord{Created: now, Updated: now, Target: ocispec.Descriptor{MediaType: doc.MediaType, Digest: digest.Digest(d), Size: int64(len(data))}}
	return func(tx *metadata.Tx) error { return tx.Images().Put(name, rec) }, nil
}

// containerAgain takes the name from the container's own directory.
func (w *work) containerAgain(ctx context.Context, id string) (func(*metadata.Tx) error, error) {
	snapshots, err := w.children(ctx, layout.ContainerNode(layout.ContainerID(id)), layout.RelRootfs)
	if err != nil {
		return nil, err
	}
	if len(snapshots) != 1 {
		return nil, fmt.Errorf("it has %d root file systems: %w", len(snapshots), errdefs.ErrNotFound)
	}
	var config struct {
		Name string `json:"name"`
	}
	f, err := w.Root.OpenBelow(layout.ContainerPath(layout.ContainerID(id)), layout.ContainerConfig)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := json.NewDecoder(f).Decode(&config); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path.Join(layout.ContainerPath(layout.ContainerID(id)), layout.ContainerConfig), err, errdefs.ErrNotFound)
	}
	rec := layout.ContainerRecord{Name: config.Name, Snapshot: layout.SnapshotKey(snapshots[0]), Created: time.Now().UTC()}
	return func(tx *metadata.Tx) error { return tx.Containers().Put(layout.ContainerID(id), rec) }, nil
}

// childNodes returns what a node has under a relation, and children their ids.
func (w *work) childNodes(ctx context.Context, n layout.Node, rel string) (nodes []layout.Node, err error) {
	err = w.DB.View(ctx, func(tx *metadata.Tx) error {
		edges, err := tx.Children(n)
		for _, e := range edges {
			if e.Rel == rel && !slices.Contains(nodes, e.Child) {
				nodes = append(nodes, e.Child)
			}
		}
		return err
	})
	return nodes, err
}

func (w *work) children(ctx context.Context, n layout.Node, rel string) (ids []string, err error) {
	nodes, err := w.childNodes(ctx, n, rel)
	for _, c := range nodes {
		_, id := c.Split()
		ids = append(ids, id)
	}
	return ids, err
}

// hashes tells whether a file that is not recorded has the bytes of a blob.
func (w *work) hashes(ctx context.Context, d layout.BlobDigest) error {
	sum, err := sumOf(ctx, reach.NewReader(), w.Root.Path(layout.BlobPath(d)), d.Hex())
	if err == nil && sum != d.Hex() {
		err = &errdefs.Corrupt{Invariant: "B3", Object: "blob " + string(d), Detail: "its bytes have the hash " + sum}
	}
	return err
}
