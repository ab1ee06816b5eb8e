package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"varve.dev/durable"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
	"varve.dev/metadata"
)

const (
	sweptLayers = 10
	sweepRounds = 9
	// smallStore is what the large one is compared with.
	smallStore = 1000
)

// sweeps removes ten layers from stores of different sizes.
func sweeps(ctx context.Context, s settings) error {
	fmt.Printf("\nremoval of %d layers, to the end of the deleting; medians of %d\n", sweptLayers, sweepRounds)
	if err := sweepBoth("varve", s.layers, func(n int) ([]time.Duration, string, error) { return varveSweep(ctx, s, n) }); err != nil {
		return fmt.Errorf("varve: %w", err)
	}
	if !s.peers {
		return nil
	}
	return containerdSweep(ctx, s)
}

// sweepBoth prints a line for the small store, one for the large, and the ratio.
func sweepBoth(name string, large int, sweep func(n int) (took []time.Duration, also string, err error)) error {
	var medians []time.Duration
	for _, n := range []int{smallStore, large} {
		took, also, err := sweep(n)
		if err != nil {
			return err
		}
		medians = append(medians, at(50, took))
		fmt.Printf("%-12s of %7d: p50 %s, longest %s%s\n", name, n, ms(at(50, took)), ms(at(100, took)), also)
	}
	fmt.Printf("%-12s p50 ratio %.2f\n", name, float64(medians[1])/float64(medians[0]))
	return nil
}

// syncs counts flushes.
type syncs struct{ n atomic.Int64 }

func (c *syncs) Observe(op durable.Op) {
	if op.Kind == durable.OpSync || op.Kind == durable.OpSyncDir || op.Kind == durable.OpBarrier {
		c.n.Add(1)
	}
}

// varveSweep makes a store of n layers and removes ten, again and again. The last
// time, which is not timed, it counts what that costs.
func varveSweep(ctx context.Context, s settings, n int) (took []time.Duration, also string, err error) {
	dir, err := os.MkdirTemp(s.dir, "varve-r-")
	if err != nil {
		return nil, "", err
	}
	defer os.RemoveAll(dir)
	store, err := teststore.Open(ctx, filepath.Join(dir, "root"))
	if err != nil {
		return nil, "", err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	if err := makeLayers(ctx, store, n+sweptLayers*(sweepRounds+1)); err != nil {
		return nil, "", err
	}
	if err := flush(dir); err != nil {
		return nil, "", err
	}
	for round := range sweepRounds {
		d, err := timed(func() error { return removeLayers(ctx, store, n+round*sweptLayers) })
		if err != nil {
			return nil, "", err
		}
		took = append(took, d)
	}
	counted := &syncs{}
	store.Root.SetObserver(counted)
	defer store.Root.SetObserver(nil)
	before, _ := store.DB.Commits()
	err = removeLayers(ctx, store, n+sweepRounds*sweptLayers)
	after, _ := store.DB.Commits()
	return took, fmt.Sprintf(", %d commits, %d other syncs", after-before, counted.n.Load()), err
}

// removeLayers drops ten layers from the first on, and waits for their files to go.
func removeLayers(ctx context.Context, store *teststore.Store, first int) error {
	err := store.DB.Update(ctx, func(tx *metadata.Tx) (err error) {
		for i := first; i < first+sweptLayers; i++ {
			err = errors.Join(err, tx.Unlink(holdOf(i)))
		}
		return err
	})
	if err == nil {
		err = store.Journal.Drain(ctx)
	}
	if err != nil {
		return err
	}
	for i := first; i < first+sweptLayers; i++ {
		if _, err := os.Lstat(store.Root.Path(layout.LayerPath(layerOf(i)))); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("layer %d is still there: %v", i, err)
		}
	}
	return nil
}

// holdOf is what keeps snapshot i.
func holdOf(i int) layout.Edge {
	return layout.Edge{Parent: layout.ContainerdNode, Rel: layout.RelHolds, Child: layout.SnapshotNode(snapshotOf(i))}
}

func snapshotOf(i int) layout.SnapshotKey { return layout.SnapshotKey(fmt.Sprint("s", i)) }

func layerOf(i int) layout.LayerID { return layout.LayerID(fmt.Sprintf("%032x", i)) }

// makeLayers makes layers of a few files each, with a snapshot for each.
func makeLayers(ctx context.Context, store *teststore.Store, n int) error {
	const batch = 2000
	for from := 0; from < n; from += batch {
		to := min(n, from+batch)
		for i := from; i < to; i++ {
			if err := makeTree(store.Root.Path(filepath.Join(layout.LayerPath(layerOf(i)), layout.TreeDir, "dir"))); err != nil {
				return err
			}
		}
		err := store.DB.Update(ctx, func(tx *metadata.Tx) (err error) {
			for i := from; i < to; i++ {
				rec := layout.LayerRecord{DiffID: layout.DiffID(fmt.Sprintf("sha256:%064x", i)), Size: 8192, Inodes: 5}
				snap := layout.SnapshotRecord{Kind: layout.SnapshotCommitted, Layer: layerOf(i), Size: 8192, Inodes: 5}
				err = errors.Join(err, tx.PutLayer(layerOf(i), rec), tx.PutSnapshot(snapshotOf(i), snap), tx.Link(holdOf(i)))
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func makeTree(dir string) error {
	err := os.MkdirAll(dir, 0o755)
	for f := range 3 {
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, fmt.Sprint(f)), nil, 0o644)
		}
	}
	return err
}
