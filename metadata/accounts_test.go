package metadata

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Whatever is put, linked and dropped, in whatever order, the accounts and the
// uses are what they would be counted anew.
func TestAccountsOfAnything(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			db := newDB(t)
			r := rand.New(rand.NewPCG(seed, 1))
			for range 60 {
				doUpdate(t, db, func(tx *Tx) (err error) {
					for range 1 + r.IntN(8) {
						err = errors.Join(err, somethingElse(tx, r))
					}
					return err
				})
				checkAccounts(t, db)
			}
		})
	}
}

// somethingElse changes one thing among few, so that the same ones meet.
func somethingElse(tx *Tx, r *rand.Rand) error {
	blob := func() layout.BlobDigest { return digestOf(r.IntN(10)) } // 20 is a manifest: no layer lists its files in one
	snap := func() layout.SnapshotKey { return snapshotKey(r.IntN(12)) }
	nodes := []layout.Node{
		layout.BlobNode(blob()), layout.LayerNode(layerID(r.IntN(8))), layout.SnapshotNode(snap()), layout.ImageNode(fmt.Sprint("i", r.IntN(4))),
		layout.CacheNode(fmt.Sprint("c", r.IntN(4))), layout.ContainerNode(layout.ContainerID(fmt.Sprint("k", r.IntN(3)))), layout.LeaseNode("l"),
	}
	node := func() layout.Node { return nodes[r.IntN(len(nodes))] }
	now := time.Unix(int64(r.IntN(1000)), 0)
	switch r.IntN(12) {
	case 0, 1:
		return tx.Blobs().Put(blob(), layout.BlobRecord{Size: r.Int64N(1 << 20)})
	case 2:
		id := layerID(r.IntN(8))
		m := blob()
		return errors.Join(tx.Layers().Put(id, layout.LayerRecord{Manifest: m, Size: r.Int64N(1<<20) * 4096, Inodes: r.Int64N(100)}),
			tx.Link(layout.Edge{Parent: layout.LayerNode(id), Rel: layout.RelFiles, Child: layout.BlobNode(m)}))
	case 3, 4:
		n := r.IntN(12)
		rec := layout.SnapshotRecord{Kind: layout.SnapshotCommitted, Layer: layerID(r.IntN(8))}
		if n > 0 {
			rec.Parent = snapshotKey(r.IntN(n)) // never a circle
		}
		return tx.PutSnapshot(snapshotKey(n), rec)
	case 5:
		target := []layout.BlobDigest{blob(), digestOf(20)}[r.IntN(2)]
		return tx.PutImage(fmt.Sprint("i", r.IntN(4)), layout.ImageRecord{Target: ocispec.Descriptor{Digest: target.Digest()}})
	case 6:
		return tx.PutCache(fmt.Sprint("c", r.IntN(4)), layout.CacheRecord{Snapshots: []layout.SnapshotKey{snap()}, LastUse: now})
	case 7:
		id := layout.ContainerID(fmt.Sprint("k", r.IntN(3)))
		return errors.Join(tx.Containers().Put(id, layout.ContainerRecord{}),
			tx.Measures().Put(layout.ContainerPath(id), layout.MeasureRecord{Bytes: r.Int64N(1 << 20), Inodes: 3}),
			tx.Link(layout.Edge{Parent: layout.ContainerNode(id), Rel: layout.RelRootfs, Child: layout.SnapshotNode(snap())}))
	case 8:
		return tx.Link(layout.Edge{Parent: layout.BlobNode(digestOf(20)), Rel: layout.RelUnpacked, Child: layout.SnapshotNode(snap())})
	case 9:
		return tx.Link(layout.Edge{Parent: layout.LeaseNode("l"), Rel: layout.RelHolds, Child: node()})
	case 10:
		return tx.Drop(node())
	}
	n := node()
	edges, err := tx.Parents(n)
	if err != nil || len(edges) == 0 {
		return err
	}
	return tx.Unlink(edges[r.IntN(len(edges))])
}

// What is a build's alone is spare, until an image needs it, and again when no
// image does; a container's tree counts as it was measured.
func TestSpareIsWhatNobodyUses(t *testing.T) {
	db := newDB(t)
	spare := func() (n int64) {
		view(t, db, func(tx *Tx) error {
			all, err := tx.Accounts()
			n = all[layout.AccountSpareLayers].Count
			return err
		})
		return n
	}
	doUpdate(t, db, func(tx *Tx) error { return putChain(tx, 3) })
	if n := spare(); n != 0 {
		t.Errorf("%d of an image's layers are spare", n)
	}
	doUpdate(t, db, func(tx *Tx) error {
		return errors.Join(tx.PutCache("step", layout.CacheRecord{Snapshots: []layout.SnapshotKey{snapshotKey(1)}}), tx.Drop(layout.ImageNode("image")))
	})
	if n := spare(); n != 2 {
		t.Errorf("%d layers are spare, not the 2 of the step", n)
	}
	doUpdate(t, db, func(tx *Tx) error {
		return tx.Link(layout.Edge{Parent: layout.ContainerNode("c"), Rel: layout.RelRootfs, Child: layout.SnapshotNode(snapshotKey(0))})
	})
	if n := spare(); n != 1 {
		t.Errorf("%d layers are spare, not the 1 above the container's", n)
	}
}

// checkAccounts compares the accounts and the uses with what Recount makes of them.
// Errors: Corrupt (A1, E5).
func (tx *Tx) checkAccounts() error {
	have, err := tx.Accounts()
	if err != nil {
		return err
	}
	have = maps.Clone(have)
	sum := tx.bolt.Bucket([]byte(layout.BucketUses)).Sequence()
	if err := tx.Recount(); err != nil {
		return err
	}
	if again := tx.bolt.Bucket([]byte(layout.BucketUses)).Sequence(); sum != again {
		return &errdefs.Corrupt{Invariant: "E5", Object: "bucket " + layout.BucketUses, Detail: "counted anew it is another"}
	}
	if !maps.Equal(have, tx.accounts) {
		return &errdefs.Corrupt{Invariant: "A1", Object: "accounts", Detail: fmt.Sprintf("%v, counted anew %v", have, tx.accounts)}
	}
	return nil
}
