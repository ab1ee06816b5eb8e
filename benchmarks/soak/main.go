// Command soak makes many different builds, one after the other, in a varve daemon
// and in buildkitd, whose caches both have the same cap, and looks at what their
// memory and their stores come to.
//
//	go run ./benchmarks/soak [-builds N] [-cap MIB] [-plot FILE] [-peer=false]
//
// After each build the heap that lives is asked for, by the debug listener that
// both have, after a collection. Ten times a second the resident memory of the
// daemon and of all that it has started is added up, and the most that each of
// these ever had (VmHWM); once a second the store's directory is measured.
//
// It fails if varve breaks a promise: heap or VmHWM above 256 MiB, a heap that
// grows in the last three fifths of the builds, a store above the cap.
// It wants root, busybox-static, docker-registry, runc and `make build`.
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

const mib = 1 << 20

type options struct {
	dir, bin, plot string
	builds         int
	cap            int64 // bytes of a store
	peer           bool
}

func main() {
	var o options
	capMiB := flag.Int64("cap", 1024, "MiB that a store may take")
	flag.StringVar(&o.dir, "dir", "/var/tmp", "a directory for both stores")
	flag.StringVar(&o.bin, "bin", "bin", "the directory of varve and varve-runtime")
	flag.StringVar(&o.plot, "plot", "", "an SVG file to write the curves to")
	flag.IntVar(&o.builds, "builds", 500, "builds of each")
	flag.BoolVar(&o.peer, "peer", true, "build with buildkitd, too")
	flag.Parse()
	o.cap = *capMiB * mib
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	b, err := bench.New(o.dir, "varve-soak-")
	if err != nil {
		return err
	}
	var engines []*engine
	base, registry, err := b.Busybox(ctx)
	if err == nil {
		engines, err = startEngines(ctx, o, b, registry)
	}
	if err == nil {
		err = soak(ctx, o, engines, filepath.Join(b.Dir, "context"), base)
	}
	err = errors.Join(err, b.End())
	if engines = slices.DeleteFunc(engines, func(e *engine) bool { return len(e.builds) == 0 }); len(engines) == 0 {
		return err
	}
	report(o, engines)
	if o.plot != "" {
		err = errors.Join(err, os.WriteFile(o.plot, plot(o, engines), 0o644))
	}
	return errors.Join(err, engines[0].broken(o))
}

// startEngines starts varve and then, if it is to be compared, buildkitd.
func startEngines(ctx context.Context, o options, b *bench.Bench, registry string) (engines []*engine, err error) {
	bin, err := filepath.Abs(o.bin)
	if err != nil {
		return nil, err
	}
	e, err := startVarve(ctx, b, filepath.Join(b.Dir, "varve"), bin, registry, o.cap)
	if err != nil {
		return nil, err
	}
	engines = append(engines, e)
	if !o.peer {
		return engines, nil
	}
	peer, err := bench.Peer(ctx, "buildkit")
	if err != nil {
		return engines, err
	}
	if e, err = startBuildkitd(ctx, b, filepath.Join(b.Dir, "buildkit"), peer, registry, o.cap); err == nil {
		engines = append(engines, e)
	}
	return engines, err
}

// progressEvery is how many builds there are between two lines.
const progressEvery = 50

// soak takes turns, so that both see the same machine.
func soak(ctx context.Context, o options, engines []*engine, dir, base string) error {
	for i := range o.builds {
		dockerfile, err := different(dir, base, i)
		if err != nil {
			return err
		}
		for _, e := range engines {
			if err := e.build(ctx, dir, dockerfile); err != nil {
				return fmt.Errorf("%s: build %d: %w", e.name, i, err)
			}
		}
		if (i+1)%progressEvery == 0 {
			for _, e := range engines {
				fmt.Printf("build %d of %s: %s\n", i+1, e.name, e.builds[i])
			}
		}
	}
	return nil
}
