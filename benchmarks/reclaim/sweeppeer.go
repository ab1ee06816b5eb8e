package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"varve.dev/internal/testkit"
)

// containerdSweep removes an image of ten layers among few snapshots and among
// more: its collector goes through all to find them.
func containerdSweep(ctx context.Context, s settings) error {
	ten, err := testkit.MakeMany(sweptLayers, 3)
	if err != nil {
		return err
	}
	e := &containerdEngine{}
	err = with(ctx, s, e, func() error {
		made := 0
		return sweepBoth(e.name(), s.peerLayers, func(n int) (took []time.Duration, also string, err error) {
			for ; made < n && err == nil; made++ {
				// ctr keeps it by a label.
				err = e.ctr(ctx, nil, "snapshots", "prepare", fmt.Sprint("kept", made))
			}
			for round := 0; round < sweepRounds && err == nil; round++ {
				var d time.Duration
				d, err = e.sweepTen(ctx, ten)
				took = append(took, d)
			}
			return took, "", err
		})
	})
	if err != nil {
		return fmt.Errorf("%s: %w", e.name(), err)
	}
	return nil
}

// sweepTen times the removal of the image to the end of the collection.
func (e *containerdEngine) sweepTen(ctx context.Context, img testkit.Image) (time.Duration, error) {
	image, err := e.load(ctx, img)
	if err != nil {
		return 0, err
	}
	before, err := e.snapshots()
	if err != nil {
		return 0, err
	}
	took, err := timed(func() error { return e.ctr(ctx, nil, "images", "rm", "--sync", image) })
	after, serr := e.snapshots()
	if err = errors.Join(err, serr); err == nil && before-after < sweptLayers {
		err = fmt.Errorf("of %d snapshots %d are left", before, after)
	}
	return took, err
}

// snapshots counts what is on the disk.
func (e *containerdEngine) snapshots() (int, error) {
	entries, err := os.ReadDir(filepath.Join(e.dir, "root", "io.containerd.snapshotter.v1.overlayfs", "snapshots"))
	return len(entries), err
}
