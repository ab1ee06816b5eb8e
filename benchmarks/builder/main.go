// Command builder measures builds by varve beside BuildKit, at the release whose
// frontend varve has, and beside Debian's dockerd, which has an older BuildKit,
// in the same run:
//
//	go run ./benchmarks/builder [-peers=false] [-dir /var/tmp] [-rounds 10] [-varve bin/varve] WORKLOAD...
//
// The workloads, each a function of workloads.go, are
//
//	cached   a Dockerfile of 30 steps that is built already
//	change   one source file of it has changed
//	runs     a hundred RUN true, divided by a hundred
//	diamond  fifty stages that do not wait for each other, and one that has all
//	context  a context of 20,000 files, unchanged
//	touched  the same with one file changed
//	export   a layer of 1 GB of random and repeated bytes, as an OCI archive with
//	         gzip; dockerd, which cannot, saves it as it is
//
// Without one all are measured. In a round everybody does the same, one after the
// other, so that what else the machine does meets all alike. varve and buildkitd
// are driven by the same buildctl, dockerd by its own command with BuildKit. All
// run with the host's network, so that none pays for one of its own.
//
// It wants root, `make build`, the Go module proxy for BuildKit, and Debian's
// docker-registry, busybox-static and runc; dockerd is measured if docker.io is
// installed. It runs them in a temporary directory of -dir.
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

	"varve.dev/benchmarks/bench"
)

func main() {
	peers := flag.Bool("peers", true, "measure buildkitd and dockerd too")
	dir := flag.String("dir", "/var/tmp", "a directory of the file system that is measured")
	rounds := flag.Int("rounds", 10, "how often each workload is done")
	command := flag.String("varve", "bin/varve", "path of the command")
	flag.Parse()
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *dir, *command, *peers, *rounds, flag.Args())
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "builder:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, in, command string, peers bool, rounds int, names []string) (err error) {
	if command, err = filepath.Abs(command); err != nil {
		return err
	}
	chosen, err := choose(names)
	if err != nil {
		return err
	}
	b, err := bench.New(in, "varve-builder-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.End()) }()
	base, registry, err := b.Busybox(ctx)
	if err != nil {
		return err
	}
	engines, err := startEngines(ctx, b, command, registry, peers)
	if err != nil {
		return err
	}
	t := &trial{Bench: b, base: base, engines: engines, rounds: rounds}
	var rows [][]string
	for _, w := range chosen {
		row, err := t.measure(ctx, w)
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		rows = append(rows, row)
	}
	heading := []string{"workload"}
	for i, e := range engines {
		heading = append(heading, e.name()+" p50", "max")
		if i > 0 {
			heading = append(heading, "times varve's")
		}
	}
	bench.Table(fmt.Sprintf("%d rounds", rounds), slices.Insert(rows, 0, heading)...)
	return nil
}

func choose(names []string) (chosen []workload, err error) {
	for _, w := range workloads {
		if len(names) == 0 || slices.Contains(names, w.name) {
			chosen = append(chosen, w)
		}
	}
	for _, name := range names {
		if !slices.ContainsFunc(workloads, func(w workload) bool { return w.name == name }) {
			return nil, fmt.Errorf("there is no workload %q", name)
		}
	}
	return chosen, nil
}
