// Command online times a loop of pull and run through a daemon, alone and beside
// a deep check of the same store that is bounded by --rate, in turn.
//
//	go run ./benchmarks/online [-n ROUNDS] [-ops N] [-rate 50MB] [-varve bin/varve]
//
// Each of the rounds makes so many pulls (of an image that is removed before)
// and runs alone, and then as many beside the check, which begins anew whenever
// it is done. It wants root and `make build`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"varve.dev/internal/testkit"
)

func main() {
	rounds := flag.Int("n", 6, "rounds")
	ops := flag.Int("ops", 50, "pulls, and runs, of each part of a round")
	rate := flag.String("rate", "50MB", "what the check reads in a second")
	varve := flag.String("varve", "bin/varve", "path of the command")
	flag.Parse()
	path, err := filepath.Abs(*varve)
	if err == nil {
		err = run(path, *rounds, *ops, *rate)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "online:", err)
		os.Exit(1)
	}
}

// host is a daemon with a store.
type host struct {
	varve string
	env   []string
	image string // to pull and to run
}

func (h host) command(args ...string) *exec.Cmd {
	cmd := exec.Command(h.varve, args...)
	cmd.Env = h.env
	return cmd
}

// timed runs a command that has to go well.
func (h host) timed(args ...string) (time.Duration, error) {
	cmd := h.command(args...)
	begin := time.Now()
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("varve %v: %w: %s", args, err, out)
	}
	return time.Since(begin), err
}

func run(varve string, rounds, ops int, rate string) (err error) {
	dir, err := os.MkdirTemp("/var/tmp", "varve-online-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	served := filepath.Join(dir, "registry")
	if err := os.Mkdir(served, 0o755); err != nil {
		return err
	}
	registry, err := testkit.StartRegistry(context.Background(), served, "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer registry.Stop()
	h := host{varve: varve, env: append(os.Environ(), "VARVE_ROOT="+filepath.Join(dir, "root"), "VARVE_STATE="+filepath.Join(dir, "state"))}
	daemon := h.command("daemon")
	if err := daemon.Start(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, daemon.Process.Signal(syscall.SIGTERM), daemon.Wait()) }()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(dir, "state", "varve.sock")); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return errors.New("the daemon does not serve")
		}
	}
	for _, make := range []func() (testkit.Image, error){testkit.MakeBig, testkit.MakeBusybox} {
		img, err := make()
		if err == nil {
			err = img.Push(registry.Addr, img.Name)
		}
		if err != nil {
			return err
		}
		h.image = registry.Addr + "/" + img.Name
		if _, err := h.timed("pull", h.image); err != nil {
			return err
		}
	}
	var alone, beside latencies
	for range rounds {
		if err := h.loop(ops, &alone); err != nil {
			return err
		}
		if err := h.besideCheck(rate, func() error { return h.loop(ops, &beside) }); err != nil {
			return err
		}
	}
	alone.print("alone")
	beside.print("beside fsck --deep --rate " + rate)
	fmt.Printf("ratio of p99: pull %.2f, run %.2f, both %.2f\n",
		at(99, beside.pull)/at(99, alone.pull), at(99, beside.run)/at(99, alone.run), at(99, beside.both())/at(99, alone.both()))
	return nil
}

// loop pulls and runs, and notes how long each took.
func (h host) loop(ops int, into *latencies) error {
	for range ops {
		if _, err := h.timed("rmi", h.image); err != nil {
			return err
		}
		pull, err := h.timed("pull", h.image)
		if err != nil {
			return err
		}
		run, err := h.timed("run", "--rm", "--network", "none", h.image, "true")
		if err != nil {
			return err
		}
		into.pull = append(into.pull, pull.Seconds())
		into.run = append(into.run, run.Seconds())
	}
	return nil
}

// besideCheck does something while the store is checked again and again.
func (h host) besideCheck(rate string, do func() error) error {
	ctx, cancel := context.WithCancel(context.Background())
	var check error
	var done sync.WaitGroup
	done.Go(func() {
		for ctx.Err() == nil {
			cmd := h.command("fsck", "--deep", "--rate", rate)
			if check = cmd.Start(); check != nil {
				return
			}
			stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(os.Interrupt) })
			err := cmd.Wait()
			stop()
			if err != nil && ctx.Err() == nil {
				check = fmt.Errorf("the check: %w", err)
				return
			}
		}
	})
	err := do()
	cancel()
	done.Wait()
	return errors.Join(err, check)
}

// latencies are in seconds.
type latencies struct{ pull, run []float64 }

func (l latencies) both() []float64 {
	out := make([]float64, len(l.pull))
	for i := range out {
		out[i] = l.pull[i] + l.run[i]
	}
	return out
}

func (l latencies) print(what string) {
	fmt.Printf("%s, %d times: pull p50 %.0f ms, p99 %.0f ms; run p50 %.0f ms, p99 %.0f ms\n", what, len(l.pull),
		1000*at(50, l.pull), 1000*at(99, l.pull), 1000*at(50, l.run), 1000*at(99, l.run))
}

// at returns a percentile.
func at(percent int, v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[(len(v)-1)*percent/100]
}
