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

const usageRounds = 9

// fewFiles is what the containers of the first round have.
const fewFiles = 1000

// usages asks what the disk holds when many containers have written many files.
// dockerd and containerd, which go through all of them, get the first round only.
func usages(ctx context.Context, s settings) error {
	small, err := testkit.MakeBusybox()
	if err != nil {
		return err
	}
	fmt.Printf("\nwhat the disk holds, with %d containers; medians of %d\n", s.containers, usageRounds)
	return each(ctx, s, func(e engine) error {
		image, err := e.load(ctx, small)
		if err != nil {
			return err
		}
		uppers, err := containersOf(ctx, e, image, s.containers)
		if err != nil {
			return err
		}
		var medians []time.Duration
		have := 0
		for _, files := range []int{fewFiles, s.each} {
			if err := fillUp(uppers, have, files); err != nil {
				return err
			}
			have = files
			settle(ctx, e)
			rounds := usageRounds
			if e.name() != "varve" {
				rounds = 1 // they take as long the second time
			}
			var short, long []time.Duration
			for range rounds {
				d, err := timed(func() error { return e.usage(ctx, false) })
				v, verr := timed(func() error { return e.usage(ctx, true) })
				if err := errors.Join(err, verr); err != nil {
					return err
				}
				short, long = append(short, d), append(long, v)
			}
			medians = append(medians, at(50, short))
			fmt.Printf("%-12s %6d files each: %s, one by one %s\n", e.name(), files, ms(at(50, short)), ms(at(50, long)))
			if e.name() != "varve" {
				return nil
			}
		}
		fmt.Printf("%-12s ratio %.2f\n", e.name(), float64(medians[1])/float64(medians[0]))
		return nil
	})
}

// settle has measured what is measured in the background.
func settle(ctx context.Context, e engine) {
	if v, ok := e.(*varveEngine); ok {
		_ = v.cli(ctx, nil, "df", "--measure")
	}
}

// containersOf makes containers, and returns the directories that they write to.
func containersOf(ctx context.Context, e engine, image string, n int) (uppers []string, err error) {
	for range n {
		upper, _, err := e.create(ctx, image)
		if err != nil {
			return nil, err
		}
		uppers = append(uppers, upper)
	}
	switch e := e.(type) {
	case *dockerEngine:
		return e.upper(ctx)
	case *containerdEngine:
		return filepath.Glob(filepath.Join(e.dir, "root", "io.containerd.snapshotter.v1.overlayfs", "snapshots", "*", "fs"))
	}
	return uppers, nil
}

// fillUp writes empty files as a container would, a thousand in a directory.
func fillUp(uppers []string, from, to int) error {
	for _, upper := range uppers {
		for i := from; i < to; i++ {
			dir := filepath.Join(upper, fmt.Sprint("dir", i/1000))
			if i%1000 == 0 {
				if err := os.MkdirAll(dir, 0o755); err != nil {
					return err
				}
			}
			f, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
			if err != nil {
				return err
			}
			f.Close()
		}
	}
	return nil
}
