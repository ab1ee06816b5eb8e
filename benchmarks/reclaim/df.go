package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"varve.dev/api/varve"
	"varve.dev/benchmarks/bench"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

const (
	// usageRounds is how often each is asked what it takes, but for longer than
	// usageTime once only.
	usageRounds = 9
	usageTime   = time.Minute
	// dfMiB is the size of the disk that everybody gets one of.
	dfMiB = 24 << 10
	// writers fill containers.
	writers = 4
)

// asking is a way to ask for the disk usage.
type asking struct {
	name string
	do   func(ctx context.Context) error
}

// writer is an engine whose containers are filled.
type writer interface {
	engine
	// writable are the patterns of writable layers.
	writable() string
	// filled is told that files were written to containers.
	filled(ctx context.Context, files int) error
	askings() []asking
}

// df asks for the disk usage when there are many containers with many files.
func df(ctx context.Context, b *trial) error {
	registry, err := b.Registry(ctx)
	if err != nil {
		return err
	}
	small, err := pushed(registry, testkit.MakeBusybox)
	if err != nil {
		return err
	}
	each := []int{b.each / 10, b.each}
	rows := [][]string{{"", "files in each", "asked", "p50", "max", "ratio of p50"}}
	err = b.eachEngine(ctx, b.ownDisk, func(name string, e engine) error {
		w := e.(writer)
		if err := e.pull(ctx, small); err != nil {
			return err
		}
		dirs, err := makeContainers(ctx, w, small, b.containers)
		if err != nil {
			return err
		}
		first := map[string]time.Duration{}
		from := 0
		for _, n := range each {
			begin := time.Now()
			if err := fillContainers(ctx, dirs, from, n); err != nil {
				return err
			}
			from = n
			if err := w.filled(ctx, n*len(dirs)); err != nil {
				return err
			}
			fmt.Printf("%s: %d containers of %d files after %s\n", name, len(dirs), n, bench.MS(time.Since(begin)))
			for _, ask := range w.askings() {
				took, err := repeated(ctx, ask.do)
				if err != nil {
					return fmt.Errorf("%s: %w", ask.name, err)
				}
				if first[ask.name] == 0 {
					first[ask.name] = took.At(50)
				}
				rows = append(rows, []string{ask.name, fmt.Sprint(n), fmt.Sprint(len(took)), bench.MS(took.At(50)), bench.MS(took.At(100)), bench.Ratio(took.At(50), first[ask.name])})
			}
		}
		return nil
	})
	bench.Table(fmt.Sprintf("The disk usage of %d containers, through the daemon", b.containers), rows...)
	return err
}

// ownDisk gives an engine a file system with as many inodes as it takes.
func (b *trial) ownDisk(ctx context.Context, own *trial) (string, error) {
	file := filepath.Join(own.Dir, "disk")
	dir, err := own.Mkdir("mounted")
	if err != nil {
		return "", err
	}
	for _, args := range [][]string{
		{"truncate", "-s", fmt.Sprintf("%dM", dfMiB), file},
		{"mkfs.xfs", "-q", "-i", "maxpct=0", file},
		{"mount", "-o", "loop", file, dir},
	} {
		if _, err := bench.Output(ctx, nil, args...); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// makeContainers makes containers and returns their writable layers.
func makeContainers(ctx context.Context, w writer, image string, n int) (dirs []string, err error) {
	before := map[string]bool{}
	for i := range 2 {
		found, err := filepath.Glob(w.writable())
		if err != nil {
			return nil, err
		}
		for _, dir := range found {
			if i == 0 {
				before[dir] = true
			} else if !before[dir] && !strings.HasSuffix(filepath.Dir(dir), "-init") { // docker has one of these beside each
				dirs = append(dirs, dir)
			}
		}
		for made := 0; i == 0 && made < n; made++ {
			if _, err := w.create(ctx, image); err != nil {
				return nil, err
			}
		}
	}
	if len(dirs) != n {
		err = fmt.Errorf("%d containers have %d writable layers where they are looked for", n, len(dirs))
	}
	return dirs, err
}

// fillContainers writes empty files into the writable layers, as a container
// would.
func fillContainers(ctx context.Context, dirs []string, from, to int) error {
	work := make(chan string)
	errs := make(chan error, writers)
	var group sync.WaitGroup
	for range writers {
		group.Go(func() {
			for dir := range work {
				if err := emptyFiles(ctx, dir, from, to); err != nil {
					select {
					case errs <- err:
					default:
					}
				}
			}
		})
	}
	for _, dir := range dirs {
		work <- dir
	}
	close(work)
	group.Wait()
	close(errs)
	return <-errs
}

func emptyFiles(ctx context.Context, dir string, from, to int) error {
	for i := from; i < to; i++ {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		f, err := os.OpenFile(filepath.Join(dir, fmt.Sprintf("file-%d", i)), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

// repeated does something some times, or for some time.
func repeated(ctx context.Context, do func(context.Context) error) (took bench.Times, err error) {
	for begin := time.Now(); len(took) == 0 || len(took) < usageRounds && time.Since(begin) < usageTime; {
		start := time.Now()
		if err := do(ctx); err != nil {
			return nil, err
		}
		took = append(took, time.Since(start))
	}
	return took, nil
}

func (e *ours) writable() string { return filepath.Join(e.root, layout.ActiveDir, "*", layout.TreeDir) }

// filled has the containers measured, as they are from time to time when they
// have run: their locks are touched as if they had.
func (e *ours) filled(ctx context.Context, files int) error {
	locks, err := filepath.Glob(filepath.Join(e.root, layout.ContainersDir, "*", layout.ContainerLock))
	if err != nil {
		return err
	}
	for _, lock := range locks {
		if err := os.Chtimes(lock, time.Time{}, time.Now()); err != nil {
			return err
		}
	}
	u, err := e.client.DiskUsage(ctx, varve.DiskUsageRequest{Measure: true})
	if err == nil && u.Containers.Inodes < int64(files) {
		err = fmt.Errorf("it knows of %d inodes of containers, and there are %d and more", u.Containers.Inodes, files)
	}
	return err
}

func (e *ours) askings() []asking {
	ask := func(args ...string) func(context.Context) error {
		return func(ctx context.Context) error { _, err := e.run(ctx, args...); return err }
	}
	return []asking{{"varve df", ask("df")}, {"varve df -v", ask("df", "-v")}}
}

func (e *containerd) writable() string { return filepath.Join(e.trees()[0], "*", "fs") }

func (e *containerd) filled(context.Context, int) error { return nil }

func (e *containerd) askings() []asking {
	return []asking{{"ctr snapshots usage", func(ctx context.Context) error { _, err := e.run(ctx, "snapshots", "usage"); return err }}}
}

func (e *docker) writable() string { return filepath.Join(e.trees()[0], "*", "diff") }

func (e *docker) filled(context.Context, int) error { return nil }

func (e *docker) askings() []asking {
	return []asking{{"docker system df", func(ctx context.Context) error { _, err := e.run(ctx, "system", "df"); return err }}}
}
