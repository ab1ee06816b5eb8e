package metadata

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

func snapshotKey(i int) layout.SnapshotKey { return layout.SnapshotKey(fmt.Sprintf("snap-%04d", i)) }
func layerID(i int) layout.LayerID         { return layout.LayerID(fmt.Sprintf("%024x", i)) }

// putChain records n committed snapshots, each on the one before, with a layer
// and its file manifest, held by an image of the newest's manifest blob.
func putChain(tx *Tx, n int) error {
	for i := range n {
		blob := digestOf(i)
		if err := tx.Blobs().Put(blob, layout.BlobRecord{}); err != nil {
			return err
		}
		diff := layout.DiffID(fmt.Sprintf("sha256:%064x", 7000+i))
		if err := tx.PutLayer(layerID(i), layout.LayerRecord{DiffID: diff, Manifest: blob}); err != nil {
			return err
		}
		if err := tx.Link(layout.Edge{Parent: layout.LayerNode(layerID(i)), Rel: layout.RelFiles, Child: layout.BlobNode(blob)}); err != nil {
			return err
		}
		rec := layout.SnapshotRecord{Kind: layout.SnapshotCommitted, Layer: layerID(i)}
		if i > 0 {
			rec.Parent = snapshotKey(i - 1)
		}
		if err := tx.PutSnapshot(snapshotKey(i), rec); err != nil {
			return err
		}
	}
	top := digestOf(n)
	if err := tx.Blobs().Put(top, layout.BlobRecord{}); err != nil {
		return err
	}
	if err := tx.Link(layout.Edge{Parent: layout.BlobNode(top), Rel: layout.RelUnpacked, Child: layout.SnapshotNode(snapshotKey(n - 1))}); err != nil {
		return err
	}
	var rec layout.ImageRecord
	rec.Target.Digest = top.Digest()
	return tx.PutImage("image", rec)
}

// checkEdgesPaired is E1, seen from here.
func checkEdgesPaired(t *testing.T, db *DB) {
	t.Helper()
	view(t, db, func(tx *Tx) error {
		var down, up []string
		c := tx.bolt.Bucket([]byte(layout.BucketEdges)).Cursor()
		for k, _ := c.First(); k != nil; k, _ = c.Next() {
			e, err := layout.ParseEdge(k)
			must(t, err)
			down = append(down, string(e.BackKey()))
		}
		c = tx.bolt.Bucket([]byte(layout.BucketEdgesBack)).Cursor()
		for k, _ := c.First(); k != nil; k, _ = c.Next() {
			up = append(up, string(k))
		}
		slices.Sort(down)
		if !slices.Equal(down, up) {
			t.Errorf("%d edges child first, %d parent first, and they differ", len(down), len(up))
		}
		return nil
	})
}

func TestLinkIsIdempotentAndPaired(t *testing.T) {
	db := newDB(t)
	e := layout.Edge{Parent: layout.ImageNode("a:b"), Rel: layout.RelTarget, Child: layout.BlobNode(digestOf(1))}
	doUpdate(t, db, func(tx *Tx) error { return errors.Join(tx.Link(e), tx.Link(e)) })
	checkEdgesPaired(t, db)
	view(t, db, func(tx *Tx) error {
		up, err := tx.Parents(e.Child)
		must(t, err)
		down, err := tx.Children(e.Parent)
		must(t, err)
		if !slices.Equal(up, []layout.Edge{e}) || !slices.Equal(down, []layout.Edge{e}) {
			t.Errorf("parents %v, children %v", up, down)
		}
		// A node whose name begins like another's is another.
		if tx.Referenced(layout.Node(string(e.Child)[:20])) {
			t.Error("a prefix of a node counts as the node")
		}
		return nil
	})
	bad := layout.Edge{Parent: "image:x\x00y", Rel: layout.RelTarget, Child: e.Child}
	if err := db.Update(t.Context(), func(tx *Tx) error { return tx.Link(bad) }); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a NUL in a node: %v", err)
	}
}

// Taking the one image away frees a chain of 500 with all its files queued;
// what a lease holds stays.
func TestDropFreesAChain(t *testing.T) {
	const n = 500
	for _, held := range []int{-1, 199} {
		t.Run(fmt.Sprintf("held=%d", held), func(t *testing.T) {
			db := newDB(t)
			doUpdate(t, db, func(tx *Tx) error { return putChain(tx, n) })
			checkEdgesPaired(t, db)
			lease := db.NewLease("test")
			if held >= 0 {
				must(t, lease.Hold(t.Context(), func(*Tx) ([]layout.Node, error) {
					return []layout.Node{layout.SnapshotNode(snapshotKey(held))}, nil
				}))
			}
			doUpdate(t, db, func(tx *Tx) error { return tx.Drop(layout.ImageNode("image")) })
			checkEdgesPaired(t, db)
			checkChain(t, db, held+1, n)
			must(t, lease.Release(t.Context()))
			checkEdgesPaired(t, db)
			checkChain(t, db, 0, n)
		})
	}
}

// The directory of a container that was being made goes with the lease that
// held it, unless the container came to be.
func TestLeaseOfAContainer(t *testing.T) {
	db := newDB(t)
	lease := db.NewLease("test")
	must(t, lease.Hold(t.Context(), func(*Tx) ([]layout.Node, error) {
		return []layout.Node{layout.ContainerNode("made"), layout.ContainerNode("unmade")}, nil
	}))
	doUpdate(t, db, func(tx *Tx) error {
		return tx.Containers().Put("made", layout.ContainerRecord{Name: "made"})
	})
	must(t, lease.Release(t.Context()))
	checkEdgesPaired(t, db)
	view(t, db, func(tx *Tx) error {
		var swept []string
		err := tx.Sweeps().Each("", func(_ string, s layout.SweepRecord) error {
			swept = append(swept, s.Path)
			return nil
		})
		if want := []string{layout.ContainerPath("unmade")}; !slices.Equal(swept, want) {
			t.Errorf("swept is %q, want %q", swept, want)
		}
		if !tx.Containers().Has("made") {
			t.Error("the container that came to be is gone")
		}
		return err
	})
}

// checkChain checks that the first kept of n snapshots are there, with what
// they need, and that of the others only sweeps are left.
func checkChain(t *testing.T, db *DB, kept, n int) {
	t.Helper()
	view(t, db, func(tx *Tx) error {
		if a, b, c := length(tx.Snapshots()), length(tx.Layers()), length(tx.Blobs()); a != kept || b != kept || c != kept {
			t.Errorf("%d snapshots, %d layers, %d blobs, want %d of each", a, b, c, kept)
		}
		if a := length(tx.layerKeys()); a != kept {
			t.Errorf("%d layer keys, want %d", a, kept)
		}
		paths := map[string]bool{}
		must(t, tx.Sweeps().Each("", func(_ string, s layout.SweepRecord) error {
			paths[s.Path] = true
			return nil
		}))
		for i := kept; i < n; i++ {
			if !paths[layout.LayerPath(layerID(i))] || !paths[layout.BlobPath(digestOf(i))] {
				t.Fatalf("no sweep for layer or blob %d", i)
			}
		}
		// One more blob: the image's manifest.
		if want := 2*(n-kept) + 1; len(paths) != want {
			t.Errorf("%d sweeps, want %d", len(paths), want)
		}
		return nil
	})
}

func TestUnlinkKeepsWhatAnotherHolds(t *testing.T) {
	db := newDB(t)
	blob := layout.BlobNode(digestOf(1))
	edge := func(name string) layout.Edge {
		return layout.Edge{Parent: layout.ImageNode(name), Rel: layout.RelTarget, Child: blob}
	}
	doUpdate(t, db, func(tx *Tx) error {
		return errors.Join(tx.Blobs().Put(digestOf(1), layout.BlobRecord{}), tx.Link(edge("a")), tx.Link(edge("b")))
	})
	for i, name := range []string{"a", "b"} {
		doUpdate(t, db, func(tx *Tx) error { return tx.Unlink(edge(name)) })
		view(t, db, func(tx *Tx) error {
			if got := tx.Exists(blob); got != (i == 0) {
				t.Errorf("after %s: exists %v", name, got)
			}
			if got := length(tx.Sweeps()); got != i {
				t.Errorf("after %s: %d sweeps", name, got)
			}
			return nil
		})
	}
}

// The cache is listed by last use, whatever happened to the records between.
func TestCacheByUse(t *testing.T) {
	db := newDB(t)
	at := func(i int) time.Time { return time.Unix(1_700_000_000, int64(i)).UTC() }
	order := func() (keys []string) {
		view(t, db, func(tx *Tx) error {
			tx.EachCacheByUse("", time.Time{}, func(key string, last time.Time) bool {
				rec, err := tx.Cache().Get(key)
				if err != nil || !rec.LastUse.Equal(last) {
					t.Errorf("%s: listed at %v, record %v, %v", key, last, rec.LastUse, err)
				}
				keys = append(keys, key)
				return true
			})
			if n := tx.bolt.Bucket([]byte(layout.BucketCacheByUse)).Stats().KeyN; n != length(tx.Cache()) {
				t.Errorf("%d places for %d records", n, length(tx.Cache()))
			}
			return nil
		})
		return keys
	}
	doUpdate(t, db, func(tx *Tx) error {
		for i, key := range []string{"c", "a", "b"} {
			if err := tx.Snapshots().Put(snapshotKey(i), layout.SnapshotRecord{Kind: layout.SnapshotCommitted}); err != nil {
				return err
			}
			if err := tx.PutCache(key, layout.CacheRecord{LastUse: at(i), Snapshots: []layout.SnapshotKey{snapshotKey(i)}}); err != nil {
				return err
			}
		}
		return nil
	})
	if got := order(); !slices.Equal(got, []string{"c", "a", "b"}) {
		t.Errorf("order %v", got)
	}
	doUpdate(t, db, func(tx *Tx) error { return errors.Join(tx.TouchCache("c", at(9)), tx.TouchCache("gone", at(9))) })
	if got := order(); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("after a use: %v", got)
	}
	// Another result takes the old one's snapshot along.
	doUpdate(t, db, func(tx *Tx) error {
		return tx.PutCache("a", layout.CacheRecord{LastUse: at(10), Snapshots: []layout.SnapshotKey{snapshotKey(2)}})
	})
	doUpdate(t, db, func(tx *Tx) error { return tx.Drop(layout.CacheNode("b")) })
	if got := order(); !slices.Equal(got, []string{"c", "a"}) {
		t.Errorf("after a removal: %v", got)
	}
	view(t, db, func(tx *Tx) error {
		for i, want := range []bool{true, false, true} {
			if tx.Snapshots().Has(snapshotKey(i)) != want {
				t.Errorf("snapshot %d is there: %v", i, !want)
			}
		}
		return nil
	})
	checkEdgesPaired(t, db)
}

// Carrying out an intent twice changes nothing; of two trees with one key the
// first stays and the other is swept.
func TestApplyTwiceAndTwins(t *testing.T) {
	db := newDB(t)
	intent := func(i int) layout.IntentRecord {
		var image layout.ImageRecord
		image.Target.Digest = digestOf(50).Digest()
		return layout.IntentRecord{
			Blobs:     []layout.BlobMove{{Digest: digestOf(50)}, {Digest: digestOf(60 + i)}},
			Layers:    []layout.LayerMove{{ID: layerID(i), Record: layout.LayerRecord{DiffID: "sha256:d", Manifest: digestOf(60 + i)}}},
			Snapshots: []layout.SnapshotMake{{Key: "chain", Record: layout.SnapshotRecord{Kind: layout.SnapshotCommitted, Layer: layerID(i)}}},
			Images:    []layout.ImageMake{{Name: "i", Record: image}},
			Edges:     []layout.Edge{{Parent: layout.BlobNode(digestOf(50)), Rel: layout.RelUnpacked, Child: layout.SnapshotNode("chain")}},
		}
	}
	for _, i := range []int{1, 1, 2} {
		doUpdate(t, db, func(tx *Tx) error {
			if err := tx.Intents().Put("x", intent(i)); err != nil {
				return err
			}
			return tx.Apply("x", intent(i))
		})
		checkEdgesPaired(t, db)
	}
	view(t, db, func(tx *Tx) error {
		id, _, err := tx.LayerByKey(layout.DiffKey("sha256:d"))
		must(t, err)
		if id != layerID(1) || length(tx.Layers()) != 1 || length(tx.Blobs()) != 2 || !tx.Intents().Empty() {
			t.Errorf("layer %s of %d, %d blobs", id, length(tx.Layers()), length(tx.Blobs()))
		}
		var swept []string
		must(t, tx.Sweeps().Each("", func(_ string, s layout.SweepRecord) error {
			swept = append(swept, s.Path)
			return nil
		}))
		slices.Sort(swept)
		if want := []string{layout.BlobPath(digestOf(62)), layout.LayerPath(layerID(2))}; !slices.Equal(swept, want) {
			t.Errorf("swept %v, want %v", swept, want)
		}
		return nil
	})
}

// TestLayersOfOneKey has two trees with one key, as builds make them: each is
// found while it is there.
func TestLayersOfOneKey(t *testing.T) {
	db := newDB(t)
	rec := layout.LayerRecord{DiffID: layout.DiffID(fmt.Sprintf("sha256:%064x", 1))}
	doUpdate(t, db, func(tx *Tx) error {
		return errors.Join(tx.PutLayer(layerID(1), rec), tx.PutLayer(layerID(2), rec), tx.PutLayer(layerID(1), rec))
	})
	for _, c := range []struct{ gone, left layout.LayerID }{{"", layerID(1)}, {layerID(1), layerID(2)}, {layerID(2), ""}} {
		doUpdate(t, db, func(tx *Tx) error { return tx.Drop(layout.LayerNode(c.gone)) })
		view(t, db, func(tx *Tx) error {
			got, _, err := tx.LayerByKey(rec.Key())
			if got != c.left || errors.Is(err, errdefs.ErrNotFound) != (c.left == "") {
				t.Errorf("without layer %q: the key leads to %q, %v", c.gone, got, err)
			}
			return nil
		})
	}
}
