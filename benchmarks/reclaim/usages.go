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

const (
	usageRounds = 9
	// peerRounds: they go through all files, and take as long every time.
	peerRounds = 1
	// fewFiles is what the containers of the first round have.
	fewFiles = 1000
	// spareInodes are left to others of the file system.
	spareInodes = 500_000
)

// usages asks what the disk holds when many containers have written many files.
func usages(ctx context.Context, s settings) error {
	small, err := testkit.MakeBusybox()
	if err != nil {
		return err
	}
	fmt.Printf("\nwhat the disk holds, with %d containers of so many empty files; medians of %d, of peers %d\n", s.containers, usageRounds, peerRounds)
	return each(ctx, s, func(e engine) error {
		image, err := e.load(ctx, small)
		for made := 0; made < s.containers && err == nil; made++ {
			_, err = e.create(ctx, image)
		}
		if err != nil {
			return err
		}
		uppers, err := e.uppers(ctx)
		if err != nil {
			return err
		}
		if len(uppers) != s.containers {
			return fmt.Errorf("%d containers write to %d directories", s.containers, len(uppers))
		}
		return usagesOf(ctx, s, e, uppers)
	})
}

// usagesOf asks one engine, with few files and with many.
func usagesOf(ctx context.Context, s settings, e engine, uppers []string) error {
	var medians []time.Duration
	have := 0
	for _, files := range []int{min(fewFiles, s.each), s.each} {
		if files == have {
			break
		}
		if want, free := int64(len(uppers)*(files-have))+spareInodes, freeInodes(s.dir); free < want {
			fmt.Printf("%-12s %6d files each: left out, %d inodes are free and it wants %d\n", e.name(), files, free, want)
			return nil
		}
		if err := fillUp(ctx, uppers, have, files); err != nil {
			return err
		}
		have = files
		if err := flush(s.dir); err != nil {
			return err
		}
		rounds, looked := peerRounds, ""
		if v, ok := e.(*varveEngine); ok {
			// What is measured in the background is measured now, which a peer does
			// whenever it is asked.
			d, err := timed(func() error { return v.measure(ctx) })
			if err != nil {
				return err
			}
			rounds, looked = usageRounds, ", a look at all files "+ms(d)
		}
		short, long, err := ask(ctx, e, rounds)
		if errors.Is(err, errUnknown) {
			fmt.Printf("%-12s %6d files each: %v\n", e.name(), files, err)
			continue
		}
		if err != nil {
			return err
		}
		medians = append(medians, at(50, short))
		fmt.Printf("%-12s %6d files each: %s, one by one %s%s\n", e.name(), files, ms(at(50, short)), ms(at(50, long)), looked)
	}
	if len(medians) == 2 {
		fmt.Printf("%-12s ratio %.2f\n", e.name(), float64(medians[1])/float64(medians[0]))
	}
	return nil
}

func ask(ctx context.Context, e engine, rounds int) (short, long []time.Duration, err error) {
	for range rounds {
		d, err := timed(func() error { return e.usage(ctx, false) })
		if err != nil {
			return nil, nil, err
		}
		v, err := timed(func() error { return e.usage(ctx, true) })
		if err != nil {
			return nil, nil, err
		}
		short, long = append(short, d), append(long, v)
	}
	return short, long, nil
}

// fillUp writes empty files as a container would, a thousand in a directory.
func fillUp(ctx context.Context, uppers []string, from, to int) error {
	for _, upper := range uppers {
		for i := from; i < to; i++ {
			dir := filepath.Join(upper, fmt.Sprint("dir", i/1000))
			if i%1000 == 0 || i == from {
				if err := errors.Join(ctx.Err(), os.MkdirAll(dir, 0o755)); err != nil {
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
