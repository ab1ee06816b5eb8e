package metadata

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Link stores an edge, in both directions. One that exists is no error, so
// that carrying out an intent twice changes nothing.
func (tx *Tx) Link(e layout.Edge) error {
	for _, n := range []layout.Node{e.Parent, e.Child} {
		if err := layout.CheckName("node", string(n)); err != nil {
			return err
		}
	}
	tx.noteEdge(e, edgeThere)
	if err := tx.put(layout.BucketEdges, e.Key(), nil); err != nil {
		return err
	}
	if err := tx.put(layout.BucketEdgesBack, e.BackKey(), nil); err != nil {
		return err
	}
	if !tx.inUse(e.Parent) {
		return nil
	}
	return tx.use(e)
}

// Unlink takes an edge away, and then its child if nothing refers to it any
// more: its record, its own edges, and so on below, each with a sweep row for
// its files. The cost follows what is freed.
func (tx *Tx) Unlink(e layout.Edge) error {
	if err := tx.cut(e); err != nil {
		return err
	}
	return tx.Collect(e.Child)
}

// cut removes both directions of an edge.
func (tx *Tx) cut(e layout.Edge) error {
	tx.noteEdge(e, nil)
	if err := tx.remove(layout.BucketEdges, e.Key()); err != nil {
		return err
	}
	if err := tx.remove(layout.BucketEdgesBack, e.BackKey()); err != nil {
		return err
	}
	return tx.disuse(e)
}

// Referenced tells whether any edge ends at n.
func (tx *Tx) Referenced(n layout.Node) bool {
	return hasPrefix(tx.bolt.Bucket([]byte(layout.BucketEdges)), layout.NodePrefix(n))
}

// Parents returns the edges that end at n.
func (tx *Tx) Parents(n layout.Node) ([]layout.Edge, error) {
	return tx.edges(layout.BucketEdges, n, layout.ParseEdge)
}

// ParentsBy returns the edges of one relation that end at n.
func (tx *Tx) ParentsBy(n layout.Node, rel string) ([]layout.Edge, error) {
	return tx.edgesWith(layout.BucketEdges, layout.RelationPrefix(n, rel), layout.ParseEdge)
}

// ChildrenBy returns the edges of one relation that begin at n.
func (tx *Tx) ChildrenBy(n layout.Node, rel string) ([]layout.Edge, error) {
	return tx.edgesWith(layout.BucketEdgesBack, layout.RelationPrefix(n, rel), layout.ParseBackEdge)
}

// HeldOnlyBy tells whether every edge that ends at n comes from a node of this
// kind. It looks no further than the first that does not.
func (tx *Tx) HeldOnlyBy(n layout.Node, kind string) bool {
	prefix := layout.NodePrefix(n)
	c := tx.bolt.Bucket([]byte(layout.BucketEdges)).Cursor()
	for k, _ := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		e, err := layout.ParseEdge(k)
		if by, _ := e.Parent.Split(); err != nil || by != kind {
			return false
		}
	}
	return true
}

// Children returns the edges that begin at n.
func (tx *Tx) Children(n layout.Node) ([]layout.Edge, error) {
	return tx.edges(layout.BucketEdgesBack, n, layout.ParseBackEdge)
}

func (tx *Tx) edges(bucket string, n layout.Node, parse func([]byte) (layout.Edge, error)) ([]layout.Edge, error) {
	return tx.edgesWith(bucket, layout.NodePrefix(n), parse)
}

func (tx *Tx) edgesWith(bucket string, prefix []byte, parse func([]byte) (layout.Edge, error)) ([]layout.Edge, error) {
	var out []layout.Edge
	c := tx.bolt.Bucket([]byte(bucket)).Cursor()
	for k, _ := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		e, err := parse(k)
		if err != nil {
			return nil, &errdefs.Corrupt{Invariant: "M3", Object: "bucket " + bucket, Detail: err.Error()}
		}
		out = append(out, e)
	}
	return out, nil
}

// Drop removes n, a root or not, whatever refers to it, with its edges, and
// collects what only it held. What is not there is no error.
func (tx *Tx) Drop(n layout.Node) error {
	parents, err := tx.Parents(n)
	if err != nil {
		return err
	}
	for _, e := range parents {
		if err := tx.cut(e); err != nil {
			return err
		}
	}
	return tx.free(n)
}

// Collect removes n if it is no root and nothing refers to it.
func (tx *Tx) Collect(n layout.Node) error {
	if n.Root() || tx.Referenced(n) {
		return nil
	}
	return tx.free(n)
}

// free removes n and everything that becomes unreferenced by that, without
// recursion: a chain may be hundreds of snapshots long.
func (tx *Tx) free(n layout.Node) error {
	todo := []layout.Node{n}
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		children, err := tx.Children(n)
		if err != nil {
			return err
		}
		if err := tx.erase(n); err != nil {
			return err
		}
		for _, e := range children {
			if err := tx.cut(e); err != nil {
				return err
			}
			switch {
			case tx.Referenced(e.Child):
			case !e.Child.Root():
				todo = append(todo, e.Child)
			case !tx.Exists(e.Child):
				if err := tx.unmake(e.Child); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// unmake queues the files of a container that an operation held while it made
// it, and that no record was made of.
func (tx *Tx) unmake(n layout.Node) error {
	kind, id := n.Split()
	if kind != layout.KindContainer {
		return nil
	}
	return tx.sweepMeasured(n, layout.ContainerPath(layout.ContainerID(id)))
}

// erase deletes the record of n and queues its files.
func (tx *Tx) erase(n layout.Node) error {
	kind, id := n.Split()
	switch kind {
	case layout.KindBlob:
		return tx.eraseBlob(layout.BlobDigest(id))
	case layout.KindLayer:
		return tx.eraseLayer(layout.LayerID(id))
	case layout.KindActive:
		return tx.sweepMeasured(n, layout.ActivePath(layout.LayerID(id)))
	case layout.KindSnapshot:
		return tx.Snapshots().Delete(layout.SnapshotKey(id))
	case layout.KindImage:
		return tx.Images().Delete(id)
	case layout.KindContainer:
		return tx.eraseContainer(layout.ContainerID(id))
	case layout.KindLease:
		return tx.Leases().Delete(layout.LeaseID(id))
	case layout.KindIntent:
		return tx.Intents().Delete(layout.IntentID(id))
	case layout.KindCache:
		return tx.eraseCache(id)
	case layout.KindAPI:
		return nil
	}
	return fmt.Errorf("node %q has an unknown kind: %w", n, errdefs.ErrInternal)
}

func (tx *Tx) eraseBlob(d layout.BlobDigest) error {
	rec, err := tx.Blobs().Get(d)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := tx.Blobs().Delete(d); err != nil {
		return err
	}
	return tx.Sweep(layout.BlobNode(d), layout.BlobPath(d), layout.BlobUsage(rec))
}

func (tx *Tx) eraseLayer(id layout.LayerID) error {
	rec, err := tx.Layers().Get(id)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := tx.dropLayerKey(id, rec); err != nil {
		return err
	}
	if err := tx.Layers().Delete(id); err != nil {
		return err
	}
	return tx.Sweep(layout.LayerNode(id), layout.LayerPath(id), layout.LayerUsage(rec))
}

func (tx *Tx) eraseContainer(id layout.ContainerID) error {
	if !tx.Containers().Has(id) {
		return nil
	}
	if err := tx.Containers().Delete(id); err != nil {
		return err
	}
	return tx.sweepMeasured(layout.ContainerNode(id), layout.ContainerPath(id))
}

// Sweep queues the files at path for the trash. usage is what they take of the
// disk, as far as that is known.
func (tx *Tx) Sweep(n layout.Node, path string, usage layout.Usage) error {
	tx.trashed += usage.Bytes
	return tx.Sweeps().Put(layout.NewSweepID(n), layout.SweepRecord{
		Path: path, Node: n, Created: time.Now().UTC(), Bytes: usage.Bytes, Inodes: usage.Inodes,
	})
}

// SweepNow is Sweep of files that the caller moves to the trash at once, before
// anybody makes new ones under their name. It returns the row and its id.
func (tx *Tx) SweepNow(n layout.Node, path string, usage layout.Usage) (string, layout.SweepRecord, error) {
	tx.trashed += usage.Bytes
	id := layout.NewSweepID(n)
	rec := layout.SweepRecord{Path: path, Node: n, Claimed: true, Created: time.Now().UTC(), Bytes: usage.Bytes, Inodes: usage.Inodes}
	return id, rec, tx.Sweeps().Put(id, rec)
}

// sweepMeasured queues a directory for the trash that may have been measured.
func (tx *Tx) sweepMeasured(n layout.Node, path string) error {
	rec, err := tx.Measures().Get(path)
	if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		return err
	}
	if err := tx.Measures().Delete(path); err != nil {
		return err
	}
	return tx.Sweep(n, path, layout.Usage{Bytes: rec.Bytes, Inodes: rec.Inodes})
}

// Exists tells whether n has a record. The directory of a writable layer
// exists while its snapshot does; the api root exists always.
func (tx *Tx) Exists(n layout.Node) bool {
	kind, id := n.Split()
	if kind == layout.KindActive {
		return tx.Referenced(n)
	}
	bucket, ok := recordBuckets[kind]
	if !ok {
		return kind == layout.KindAPI
	}
	return tx.bolt.Bucket([]byte(bucket)).Get([]byte(id)) != nil
}

// recordBuckets have the records of nodes, by kind.
var recordBuckets = map[string]string{
	layout.KindBlob:      layout.BucketBlobs,
	layout.KindLayer:     layout.BucketLayers,
	layout.KindSnapshot:  layout.BucketSnapshots,
	layout.KindImage:     layout.BucketImages,
	layout.KindContainer: layout.BucketContainers,
	layout.KindLease:     layout.BucketLeases,
	layout.KindCache:     layout.BucketCache,
	layout.KindIntent:    layout.BucketIntents,
}

// RecordBucket is the bucket with the records of nodes of a kind.
func RecordBucket(kind string) string { return recordBuckets[kind] }
