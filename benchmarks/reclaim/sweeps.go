package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
	"varve.dev/metadata"
)

const (
	sweptLayers = 10
	sweepRounds = 7
	// smallStore is what the large one is compared with.
	smallStore = 1000
	// peerLayers is how many containerd gets: each costs two commands.
	peerLayers = 5000
)

// sweeps removes ten layers from stores of different sizes.
func sweeps(ctx context.Context, s settings) error {
	fmt.Printf("\nremoval of %d layers, to the end of the deleting; medians of %d\n", sweptLayers, sweepRounds)
	var medians []time.Duration
	for _, n := range []int{smallStore, s.layers} {
		took, err := varveSweep(ctx, s, n)
		if err != nil {
			return err
		}
		medians = append(medians, at(50, took))
		fmt.Printf("%-12s of %7d: %s\n", "varve", n, ms(at(50, took)))
	}
	fmt.Printf("%-12s ratio %.2f\n", "varve", float64(medians[1])/float64(medians[0]))
	if !s.peers {
		return nil
	}
	return containerdSweep(ctx, s)
}

// varveSweep makes a store of n layers and removes ten, again and again.
func varveSweep(ctx context.Context, s settings, n int) (took []time.Duration, err error) {
	dir, err := os.MkdirTemp(s.dir, "varve-reclaim-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	store, err := teststore.Open(ctx, filepath.Join(dir, "root"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	if err := makeLayers(ctx, store, n+sweptLayers*sweepRounds); err != nil {
		return nil, err
	}
	defer store.Journal.Hurry()()
	for round := range sweepRounds {
		d, err := timed(func() error {
			err := store.DB.Update(ctx, func(tx *metadata.Tx) (err error) {
				for i := range sweptLayers {
					err = errors.Join(err, tx.Unlink(holdOf(n+round*sweptLayers+i)))
				}
				return err
			})
			return errors.Join(err, store.Journal.Drain(ctx))
		})
		if err != nil {
			return nil, err
		}
		took = append(took, d)
	}
	return took, nil
}

// holdOf is what keeps snapshot i.
func holdOf(i int) layout.Edge {
	return layout.Edge{Parent: layout.ContainerdNode, Rel: layout.RelHolds, Child: layout.SnapshotNode(layout.SnapshotKey(fmt.Sprint("s", i)))}
}

// makeLayers makes layers of a few files each, with a snapshot for each.
func makeLayers(ctx context.Context, store *teststore.Store, n int) error {
	const batch = 2000
	for from := 0; from < n; from += batch {
		to := min(n, from+batch)
		for i := from; i < to; i++ {
			tree := store.Root.Path(filepath.Join(layout.LayerPath(layerOf(i)), layout.TreeDir, "dir"))
			if err := os.MkdirAll(tree, 0o755); err != nil {
				return err
			}
			for f := range 3 {
				if err := os.WriteFile(filepath.Join(tree, fmt.Sprint(f)), nil, 0o644); err != nil {
					return err
				}
			}
		}
		err := store.DB.Update(ctx, func(tx *metadata.Tx) (err error) {
			for i := from; i < to; i++ {
				rec := layout.LayerRecord{DiffID: layout.DiffID(fmt.Sprintf("sha256:%064x", i)), Size: 8192, Inodes: 5}
				snap := layout.SnapshotRecord{Kind: layout.SnapshotCommitted, Layer: layerOf(i), Size: 8192, Inodes: 5}
				err = errors.Join(err, tx.PutLayer(layerOf(i), rec), tx.PutSnapshot(layout.SnapshotKey(fmt.Sprint("s", i)), snap), tx.Link(holdOf(i)))
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func layerOf(i int) layout.LayerID { return layout.LayerID(fmt.Sprintf("%032x", i)) }

// containerdSweep has containerd collect ten snapshots among few and among more:
// what goes is found by going through everything.
func containerdSweep(ctx context.Context, s settings) error {
	small, err := testkit.MakeBusybox()
	if err != nil {
		return err
	}
	e := &containerdEngine{}
	dir, err := os.MkdirTemp(s.dir, "varve-reclaim-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := e.start(ctx, dir); errors.Is(err, errAbsent) {
		fmt.Printf("%-12s %v\n", e.name(), err)
		return nil
	} else if err != nil {
		return err
	}
	defer e.stop()
	made := 0
	snapshot := func(kept bool) error {
		made++
		key := fmt.Sprint("s", made)
		_, err := e.ctr(ctx, nil, "snapshots", "prepare", key)
		if err == nil && kept {
			_, err = e.ctr(ctx, nil, "snapshots", "label", key, "containerd.io/gc.root=yes")
		}
		return err
	}
	var medians []time.Duration
	for _, n := range []int{smallStore, peerLayers} {
		for made < n {
			if err := snapshot(true); err != nil {
				return err
			}
		}
		var took []time.Duration
		for range sweepRounds {
			image, err := e.load(ctx, small)
			for range sweptLayers {
				err = errors.Join(err, snapshot(false))
			}
			if err != nil {
				return err
			}
			d, err := timed(func() error { return e.remove(ctx, image, true) })
			if err != nil {
				return err
			}
			took = append(took, d)
		}
		medians = append(medians, at(50, took))
		fmt.Printf("%-12s of %7d: %s\n", e.name(), n, ms(at(50, took)))
	}
	fmt.Printf("%-12s ratio %.2f, for five times as many\n", e.name(), float64(medians[1])/float64(medians[0]))
	return nil
}
