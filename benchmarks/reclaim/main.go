// Command reclaim measures what removals cost: the caller, who else uses the
// engine meanwhile, and the look at what the disk holds. Debian's dockerd and
// containerd do the same work beside varve, one after the other, each with a root
// of its own on the same file system.
//
//	go run ./benchmarks/reclaim [-files N] [-sweep=false] [-df=false] [-peers=false] [-varve bin/varve] [-dir /var/tmp]
//
// It asks three things. How long does the removal of an image of so many files
// take for its caller, how long does making containers take meanwhile, and when is
// the disk free? What does a removal cost that is small in a store that is large?
// How long does it take to tell what the disk holds? It wants root, `make build`,
// and free inodes: for a million files three million, and for the containers of
// df ten million, or fewer with -each. All of it takes about half an hour.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// settings are the flags.
type settings struct {
	files, layers    int
	containers, each int
	varve, dir       string
	rmi, sweep, df   bool
	peers            bool
}

func main() {
	var s settings
	flag.IntVar(&s.files, "files", 1_000_000, "files of the image that is removed")
	flag.IntVar(&s.layers, "layers", 100_000, "layers of the large store, the small one has a thousand")
	flag.IntVar(&s.containers, "containers", 1000, "containers that df tells of")
	flag.IntVar(&s.each, "each", 10_000, "files of each, beside a round with a thousand")
	flag.StringVar(&s.varve, "varve", "bin/varve", "path of the command")
	flag.StringVar(&s.dir, "dir", "/var/tmp", "where the roots are made")
	flag.BoolVar(&s.rmi, "rmi", true, "ask for removals")
	flag.BoolVar(&s.sweep, "sweep", true, "ask for small removals in large stores")
	flag.BoolVar(&s.df, "df", true, "ask for what the disk holds")
	flag.BoolVar(&s.peers, "peers", true, "measure dockerd and containerd too")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, s); err != nil {
		fmt.Fprintln(os.Stderr, "reclaim:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, s settings) error {
	var err error
	if s.varve, err = filepath.Abs(s.varve); err != nil {
		return err
	}
	for _, q := range []struct {
		asked bool
		ask   func(context.Context, settings) error
	}{{s.rmi, removals}, {s.sweep, sweeps}, {s.df, usages}} {
		if q.asked && err == nil {
			err = q.ask(ctx, s)
		}
	}
	return err
}

// engines are those to measure, in order.
func engines(s settings) []engine {
	all := []engine{&varveEngine{command: s.varve}}
	if s.peers {
		all = append(all, &dockerEngine{}, &containerdEngine{})
	}
	return all
}

// each starts one engine after the other in a root of its own, and clears it away.
func each(ctx context.Context, s settings, ask func(engine) error) error {
	for _, e := range engines(s) {
		if err := ctx.Err(); err != nil {
			return err
		}
		dir, err := os.MkdirTemp(s.dir, "varve-reclaim-")
		if err != nil {
			return err
		}
		err = e.start(ctx, dir)
		if errors.Is(err, errAbsent) {
			fmt.Printf("%-12s %v\n", e.name(), err)
			os.RemoveAll(dir)
			continue
		}
		if err == nil {
			err = ask(e)
		}
		err = errors.Join(err, e.stop())
		if rerr := os.RemoveAll(dir); err == nil {
			err = rerr
		}
		if err != nil {
			return fmt.Errorf("%s: %w", e.name(), err)
		}
	}
	return nil
}

// freeInodes is how many the file system still has.
func freeInodes(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0
	}
	return int64(st.Ffree)
}

// timed is how long fn takes.
func timed(fn func() error) (time.Duration, error) {
	begin := time.Now()
	err := fn()
	return time.Since(begin), err
}

// at is a percentile.
func at(p int, all []time.Duration) time.Duration {
	if len(all) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(all))
	return sorted[min(len(sorted)-1, len(sorted)*p/100)]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }
