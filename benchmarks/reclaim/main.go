// Command reclaim measures how varve gives back disk space, beside Debian's
// containerd and dockerd in the same run:
//
//	go run ./benchmarks/reclaim [-peers=false] [-dir /var/tmp] [-varve bin/varve] QUESTION...
//
// The questions, each of which has a file here, are
//
//	rmi    An image of a million files (-files) is removed: how long that takes
//	       for who asks for it, how long until the disk space is back, and how
//	       long the creation of a container takes meanwhile and before and after.
//	df     The disk usage is asked for when there are a thousand containers
//	       (-containers) of a thousand files each, and of ten thousand (-each).
//	       Everybody gets an xfs of 24 GB on a loop device for it, in turn.
//	sweep  Ten layers go, of a store of a thousand and of one of a hundred
//	       thousand (-layers), in turn; and of containerd's with fewer (-theirs),
//	       which takes long to make.
//
// Without one all are asked. It wants root, `make build` and Debian's packages
// docker-registry, busybox-static and xfsprogs; containerd and docker.io are
// measured if they are installed. It runs them with roots and sockets of its own
// in a temporary directory of -dir, which is on the file system that is measured,
// and needs 24 GB there. An interrupt ends it, and what it started, too.
//
// All of it takes hours on a busy disk: most of that is the making of what is
// then removed. -files 40000, -containers 100 -each 1000 and -theirs 1500 with
// -layers 15000 take minutes.
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

	"varve.dev/benchmarks/bench"
)

// options are the flags.
type options struct {
	varve   string
	peers   bool
	files   int
	samples int
	layers  int
	theirs  int

	containers, each int
}

// trial is where one question is asked.
type trial struct {
	options
	*bench.Bench
}

var questions = map[string]func(ctx context.Context, b *trial) error{
	"rmi":   rmi,
	"df":    df,
	"sweep": sweep,
}

func main() {
	var o options
	dir := flag.String("dir", "/var/tmp", "a directory of the file system that is measured")
	flag.StringVar(&o.varve, "varve", "bin/varve", "path of the command")
	flag.BoolVar(&o.peers, "peers", true, "measure containerd and dockerd too")
	flag.IntVar(&o.files, "files", 1_000_000, "rmi: files of the image that is removed")
	flag.IntVar(&o.samples, "samples", 400, "rmi: at least so many containers are created before and after the removal")
	flag.IntVar(&o.containers, "containers", 1000, "df: so many containers")
	flag.IntVar(&o.each, "each", 10_000, "df: files of each in the end; a tenth of it first")
	flag.IntVar(&o.layers, "layers", 100_000, "sweep: layers of the larger store; the smaller has a hundredth")
	flag.IntVar(&o.theirs, "theirs", 10_000, "sweep: layers of containerd's larger store; the smaller has a tenth")
	flag.Parse()
	// Who reads the tables may go before everything is cleaned up.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *dir, o, flag.Args())
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "reclaim:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, dir string, o options, asked []string) (err error) {
	if o.varve, err = filepath.Abs(o.varve); err != nil {
		return err
	}
	if len(asked) == 0 {
		asked = []string{"rmi", "df", "sweep"}
	}
	for _, name := range asked {
		ask := questions[name]
		if ask == nil {
			return fmt.Errorf("there is no question %q", name)
		}
		in, err := bench.New(dir, "varve-reclaim-")
		if err != nil {
			return err
		}
		b := &trial{options: o, Bench: in}
		if err := errors.Join(ask(ctx, b), b.End()); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}
