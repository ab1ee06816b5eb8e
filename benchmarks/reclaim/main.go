// Command reclaim measures what removals cost: the caller, who else uses the
// engine meanwhile, and the look at what the disk holds. Debian's dockerd and
// containerd do the same work beside varve, one after the other, each with a root
// of its own on the same file system. One that is not installed is left out.
//
//	go run ./benchmarks/reclaim [-files N] [-fs ext4|xfs|none] [-rmi=false] [-sweep=false] [-df=false] [-peers=false]
//
// It asks three things. How long does the removal of an image of so many files
// take for its caller, how long does making containers take meanwhile, and when is
// the disk free? What does a removal cost that is small in a store that is large?
// How long does it take to tell what the disk holds?
//
// varve and dockerd make containers by their API, containerd by ctr, which is a
// process each time: compare the ratios of an engine with itself, and commands
// with commands. The ratio to believe is that of the 99th percentile meanwhile to
// that before, on a machine that does nothing else.
//
// It wants root and `make build`. A million files want four gigabytes and as many
// inodes, twice while dockerd has the archives too; the containers of df want
// -containers times -each inodes, and a round that the file system has not enough
// for is left out with a line. All three are on a file system that is made for them
// in a file, or with -fs none on that of -dir: when the disk is free is seen in the
// number of its inodes, which strangers must not change meanwhile. With its defaults it takes an hour or two, most of it the peers' loads;
// -files 100000 -layers 10000 -each 1000 takes some minutes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// settings are the flags.
type settings struct {
	files, layers    int
	containers, each int
	peerLayers       int
	varve, dir, fs   string
	rmi, sweep, df   bool
	peers            bool
	patience         time.Duration
}

func main() {
	var s settings
	flag.IntVar(&s.files, "files", 1_000_000, "files of the image that is removed")
	flag.IntVar(&s.layers, "layers", 100_000, "layers of the large store, the small one has a thousand")
	flag.IntVar(&s.peerLayers, "peer-layers", 5000, "snapshots of containerd's large store: each costs two commands")
	flag.IntVar(&s.containers, "containers", 1000, "containers that df tells of")
	flag.IntVar(&s.each, "each", 10_000, "files of each, beside a round with a thousand")
	flag.StringVar(&s.varve, "varve", "bin/varve", "path of the command")
	flag.StringVar(&s.dir, "dir", "/var/tmp", "where the roots are made")
	flag.StringVar(&s.fs, "fs", "ext4", "make this file system for them in -dir, ext4 or xfs; none: use that of -dir, where nobody else may be at work")
	flag.BoolVar(&s.rmi, "rmi", true, "ask for removals")
	flag.BoolVar(&s.sweep, "sweep", true, "ask for small removals in large stores")
	flag.BoolVar(&s.df, "df", true, "ask for what the disk holds")
	flag.BoolVar(&s.peers, "peers", true, "measure dockerd and containerd too")
	flag.DurationVar(&s.patience, "patience", 20*time.Minute, "how long the disk may take to be free again")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, s); err != nil {
		fmt.Fprintln(os.Stderr, "reclaim:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, s settings) (err error) {
	if s.varve, err = filepath.Abs(s.varve); err != nil {
		return err
	}
	if s.fs != "none" {
		d, err := newDisk(ctx, s)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, d.end()) }()
		s.dir = d.dir
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
		err := with(ctx, s, e, func() error { return ask(e) })
		if err != nil {
			return fmt.Errorf("%s: %w", e.name(), err)
		}
	}
	return nil
}

// with runs one engine while fn runs. It says so when there is none.
func with(ctx context.Context, s settings, e engine, fn func() error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	// A short name: the path of a socket has 108 bytes at most, and dockerd's
	// containerd has one deep below.
	dir, err := os.MkdirTemp(s.dir, "varve-r-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, clearAway(dir)) }()
	defer func() {
		if text, rerr := os.ReadFile(filepath.Join(dir, "log")); err != nil && rerr == nil {
			fmt.Fprintf(os.Stderr, "%s wrote:\n%s", e.name(), text[max(0, len(text)-2000):])
		}
	}()
	defer func() { err = errors.Join(err, e.stop()) }() // before the directory goes
	if err := e.start(ctx, dir); errors.Is(err, errAbsent) {
		fmt.Printf("%-12s %v\n", e.name(), err)
		return nil
	} else if err != nil {
		return err
	}
	return fn()
}
