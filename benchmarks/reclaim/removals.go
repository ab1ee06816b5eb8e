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
	// after it when the disk is free.
	idleSamples = 500
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
	fmt.Printf("%-22s %14s %12s   %-22s %-22s %10s %10s %s\n", "", "caller waits", "disk is free", "create idle, p50 p99", "meanwhile, p50 p99", "p50 ratio", "p99 ratio", "samples")
	return each(ctx, s, func(e engine) error {
		base, err := e.load(ctx, small)
		for _, how := range e.removals() {
			if err == nil {
				err = removeLarge(ctx, s, e, how, base, large)
			}
		}
		return err
	})
}

// removeLarge loads the image, removes it one way, and prints a line.
func removeLarge(ctx context.Context, s settings, e engine, how removal, base string, large testkit.Image) error {
	before := usedInodes(s.dir)
	image, err := e.load(ctx, large)
	if err != nil {
		return err
	}
	taken := usedInodes(s.dir) - before
	if taken < int64(s.files)*9/10 {
		return fmt.Errorf("an image of %d files took %d inodes: is somebody else at work there?", s.files, taken)
	}
	if err := flush(s.dir); err != nil {
		return err
	}
	idle, err := creations(ctx, e, base, idleSamples, func() bool { return false })
	if err != nil {
		return err
	}
	// Beside the loop: an engine whose caller waits has nothing left to do when
	// it answers.
	type end struct {
		took time.Duration
		err  error
	}
	removed := make(chan end, 1)
	begin := time.Now()
	go func() {
		took, err := timed(func() error { return how.run(ctx, image) })
		removed <- end{took, err}
	}()
	free := watchFree(s.dir, begin, before+max(taken/50, 1000))
	defer free.stop()
	meanwhile, err := creations(ctx, e, base, 1<<30, func() bool { return free.seen() > 0 || time.Since(begin) > s.patience })
	if err != nil {
		return err
	}
	answer := <-removed
	if answer.err != nil {
		return answer.err
	}
	back := "not yet"
	if d := free.seen(); d > 0 {
		back = fmt.Sprintf("%.1f s", d.Seconds())
		after, err := creations(ctx, e, base, idleSamples, func() bool { return false })
		if err != nil {
			return err
		}
		idle = append(idle, after...)
	}
	fmt.Printf("%-22s %14s %12s   %-22s %-22s %10s %10s %d, %d\n", e.name()+" "+how.name, ms(answer.took), back,
		both(idle), both(meanwhile), ratio(50, meanwhile, idle), ratio(99, meanwhile, idle), len(idle), len(meanwhile))
	return nil
}

// creations makes containers and removes them, one after the other, and returns
// how long the making took. One that is under way when it is over counts: it may
// have waited all the time.
func creations(ctx context.Context, e engine, image string, n int, over func() bool) (took []time.Duration, err error) {
	for len(took) < n && !over() {
		var remove func() error
		d, err := timed(func() (err error) {
			remove, err = e.create(ctx, image)
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
