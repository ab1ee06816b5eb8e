package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/benchmarks/bench"
	"varve.dev/internal/testkit"
)

const (
	rmiLayers = 4
	// between two containers, so that they come at all times of the removal.
	betweenCreates = 10 * time.Millisecond
	// reclaimWait bounds the wait for space that somebody may not give back.
	reclaimWait = 20 * time.Minute
)

// rmi removes an image of many files.
func rmi(ctx context.Context, b *trial) error {
	registry, err := b.Registry(ctx)
	if err != nil {
		return err
	}
	small, err := pushed(registry, testkit.MakeBusybox)
	if err != nil {
		return err
	}
	many, err := pushed(registry, func() (testkit.Image, error) { return testkit.MakeMany(rmiLayers, b.files/rmiLayers) })
	if err != nil {
		return err
	}
	rows := [][]string{{"", "for the caller", "until the space is back", "creates", "idle p50", "p99", "meanwhile p50", "p99", "max", "ratio p50", "ratio p99", "with its removal: idle max", "meanwhile max"}}
	err = b.eachEngine(ctx, nil, func(_ string, e engine) error {
		if err := e.pull(ctx, small); err != nil {
			return err
		}
		for _, way := range e.removals() {
			r, err := removeMany(ctx, e, way, small, many, b.samples)
			if err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
			rows = append(rows, r.row(way.name))
		}
		return nil
	})
	bench.Table(fmt.Sprintf("An image of %d files in %d layers is removed", b.files, rmiLayers), rows...)
	return err
}

// pushed brings an image into the registry and returns its name there.
func pushed(registry *testkit.RegistryServer, make func() (testkit.Image, error)) (string, error) {
	img, err := make()
	if err == nil {
		err = img.Push(registry.Addr, img.Name)
	}
	return registry.Ref(img.Name), err
}

// reclaim is what was measured of a removal.
type reclaim struct {
	caller, back    time.Duration
	idle, meanwhile made
}

// made is how long containers took to make, and to make and remove: who holds up
// the one may hold up only the other.
type made struct{ create, both bench.Times }

func (m *made) add(more made) {
	m.create, m.both = append(m.create, more.create...), append(m.both, more.both...)
}

func (r reclaim) row(name string) []string {
	back := "not within " + reclaimWait.String()
	if r.back > 0 {
		back = bench.MS(r.back)
	}
	idle, meanwhile := r.idle.create, r.meanwhile.create
	return []string{
		name, bench.MS(r.caller), back, fmt.Sprintf("%d, %d", len(idle), len(meanwhile)), bench.MS(idle.At(50)), bench.MS(idle.At(99)),
		bench.MS(meanwhile.At(50)), bench.MS(meanwhile.At(99)), bench.MS(meanwhile.At(100)), bench.Ratio(meanwhile.At(50), idle.At(50)), bench.Ratio(meanwhile.At(99), idle.At(99)),
		bench.MS(r.idle.both.At(100)), bench.MS(r.meanwhile.both.At(100)),
	}
}

// removeMany pulls an image, removes it, and creates containers before, while the
// space comes back, and, as many as it takes to have as many of both, after.
func removeMany(ctx context.Context, e engine, way removal, small, many string, samples int) (r reclaim, err error) {
	before, err := directories(e.trees())
	if err != nil {
		return r, err
	}
	if err := e.pull(ctx, many); err != nil {
		return r, err
	}
	after, err := directories(e.trees())
	if err != nil {
		return r, err
	}
	for known := range before {
		delete(after, known)
	}
	if len(after) < rmiLayers {
		return r, fmt.Errorf("the image's layers are in %d directories: not where they are looked for", len(after))
	}
	// What others have not written by themselves yet is none of the removal's
	// business.
	unix.Sync()
	if err := bench.Sleep(ctx, 2*time.Second); err != nil {
		return r, err
	}
	enough := func(n int) func(int) bool { return func(made int) bool { return made >= n } }
	if r.idle, err = creates(ctx, e, small, enough(samples/2)); err != nil {
		return r, err
	}
	var back atomic.Bool
	removed := make(chan error, 1)
	go func() {
		defer back.Store(true)
		begin := time.Now()
		err := way.do(ctx, many)
		r.caller = time.Since(begin)
		for ; err == nil && time.Since(begin) < reclaimWait; err = bench.Sleep(ctx, 20*time.Millisecond) {
			left, derr := directories(e.trees())
			if derr == nil && !overlap(left, after) {
				r.back = time.Since(begin)
				break
			}
		}
		removed <- err
	}()
	r.meanwhile, err = creates(ctx, e, small, func(int) bool { return back.Load() })
	if rerr := <-removed; rerr != nil {
		return r, rerr
	}
	if err != nil {
		return r, err
	}
	if err := bench.Sleep(ctx, 2*time.Second); err != nil {
		return r, err
	}
	rest, err := creates(ctx, e, small, enough(max(samples/2, len(r.meanwhile.create)-len(r.idle.create))))
	r.idle.add(rest)
	return r, err
}

// creates makes and removes containers until there are enough.
func creates(ctx context.Context, e engine, image string, enough func(n int) bool) (t made, err error) {
	for !enough(len(t.create)) {
		begin := time.Now()
		id, err := e.create(ctx, image)
		if err != nil {
			return t, err
		}
		t.create = append(t.create, time.Since(begin))
		if err := e.remove(ctx, id); err != nil {
			return t, err
		}
		t.both = append(t.both, time.Since(begin))
		if err := bench.Sleep(ctx, betweenCreates); err != nil {
			return t, err
		}
	}
	return t, nil
}

// birth tells directories apart, whatever they are renamed to: an inode alone may
// be another's soon.
type birth struct {
	inode uint64
	at    unix.StatxTimestamp
}

// directories are those in others.
func directories(in []string) (map[birth]bool, error) {
	found := map[birth]bool{}
	for _, dir := range in {
		entries, err := os.ReadDir(dir)
		if err != nil && !os.IsNotExist(err) {
			return nil, err
		}
		for _, e := range entries {
			var st unix.Statx_t
			if e.IsDir() && unix.Statx(unix.AT_FDCWD, filepath.Join(dir, e.Name()), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_INO|unix.STATX_BTIME, &st) == nil {
				found[birth{st.Ino, st.Btime}] = true
			}
		}
	}
	return found, nil
}

func overlap(a, b map[birth]bool) bool {
	for k := range a {
		if b[k] {
			return true
		}
	}
	return false
}
