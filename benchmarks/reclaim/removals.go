package main

import (
	"context"
	"fmt"
	"time"

	"varve.dev/internal/testkit"
)

const (
	// removedLayers is how many the large image has.
	removedLayers = 4
	// idleSamples is how many containers are made before the removal, and as many
	// after it.
	idleSamples = 500
	// patience is how long the disk may take to be free again.
	patience = 20 * time.Minute
)

// removals removes a large image, and makes containers of a small one meanwhile.
func removals(ctx context.Context, s settings) error {
	large, err := testkit.MakeMany(removedLayers, s.files/removedLayers)
	if err != nil {
		return err
	}
	small, err := testkit.MakeBusybox()
	if err != nil {
		return err
	}
	fmt.Printf("removal of an image of %d files, and containers made and removed meanwhile\n", s.files)
	fmt.Printf("%-12s %14s %14s   %-32s %-32s %s\n", "", "caller waits", "disk is free", "create idle, p50 p99", "create meanwhile, p50 p99", "p99 meanwhile : idle")
	return each(ctx, s, func(e engine) error {
		base, err := e.load(ctx, small)
		if err != nil {
			return err
		}
		before := freeInodes(s.dir)
		image, err := e.load(ctx, large)
		if err != nil {
			return err
		}
		taken := before - freeInodes(s.dir)
		if taken < int64(s.files)*9/10 {
			return fmt.Errorf("an image of %d files took %d inodes", s.files, taken)
		}
		idle, err := creations(ctx, e, base, idleSamples, func() bool { return false })
		if err != nil {
			return err
		}
		begin := time.Now()
		caller, err := timed(func() error { return e.remove(ctx, image, false) })
		if err != nil {
			return err
		}
		free := time.Duration(0)
		meanwhile, err := creations(ctx, e, base, 1<<30, func() bool {
			if free == 0 && before-freeInodes(s.dir) < max(taken/50, 10_000) {
				free = time.Since(begin)
			}
			return free > 0 || time.Since(begin) > patience
		})
		if err != nil {
			return err
		}
		after, err := creations(ctx, e, base, idleSamples, func() bool { return false })
		if err != nil {
			return err
		}
		idle = append(idle, after...)
		back := fmt.Sprintf("%.1f s", free.Seconds())
		if free == 0 {
			back = "not yet"
		}
		fmt.Printf("%-12s %14s %14s   %-32s %-32s %.2f (%d and %d samples)\n", e.name(), ms(caller), back,
			ms(at(50, idle))+" "+ms(at(99, idle)), ms(at(50, meanwhile))+" "+ms(at(99, meanwhile)),
			float64(at(99, meanwhile))/float64(at(99, idle)), len(idle), len(meanwhile))
		return nil
	})
}

// creations makes containers and removes them, one after the other.
func creations(ctx context.Context, e engine, image string, n int, over func() bool) (took []time.Duration, err error) {
	for range n {
		if over() {
			break
		}
		var remove func() error
		d, err := timed(func() (err error) {
			_, remove, err = e.create(ctx, image)
			return err
		})
		if err == nil {
			err = remove()
		}
		if err != nil {
			return took, err
		}
		took = append(took, d)
	}
	return took, nil
}
