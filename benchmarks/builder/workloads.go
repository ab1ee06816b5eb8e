package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"varve.dev/benchmarks/bench"
)

// trial is the engines, and the image that all Dockerfiles begin with.
type trial struct {
	*bench.Bench
	base    string
	engines []engine
	rounds  int
}

// workload is something to build again and again.
type workload struct {
	name string
	// make puts a context into a directory.
	make func(t *trial, dir string) error
	// alter does to it what a round begins with; nil: nothing. The first round,
	// before the measured ones, is numbered 0.
	alter func(dir string, round int) error
	// fresh rounds have nothing in the cache that comes after ARG FRESH.
	fresh bool
	// export is measured, of what is built already, instead of the build.
	export bool
	// parts is what the time is divided by.
	parts int
}

var workloads = []workload{
	{name: "cached", make: thirtySteps},
	{name: "change", make: thirtySteps, alter: changeSource},
	{name: "runs", make: hundredRuns, fresh: true, parts: 100},
	{name: "diamond", make: diamond, fresh: true},
	{name: "context", make: manyFiles},
	{name: "touched", make: manyFiles, alter: changeSource},
	{name: "export", make: bigLayer, fresh: true, export: true},
}

// measure does a workload and returns its row of the table.
func (t *trial) measure(ctx context.Context, w workload) ([]string, error) {
	dir, err := t.Mkdir("context-" + w.name)
	if err != nil {
		return nil, err
	}
	if err := w.make(t, dir); err != nil {
		return nil, err
	}
	took := make([]bench.Times, len(t.engines))
	failed := make([]bool, len(t.engines))
	rounds := t.rounds
	if w.export || w.parts > 0 { // long ones
		rounds = max(1, rounds/4)
	}
	for round := range rounds + 1 {
		if w.alter != nil {
			if err := w.alter(dir, round); err != nil {
				return nil, err
			}
		}
		for i, e := range t.engines {
			if failed[i] {
				continue
			}
			d, err := t.once(ctx, w, e, dir, round)
			if err != nil && (i == 0 || ctx.Err() != nil) {
				return nil, fmt.Errorf("%s: %w", e.name(), err)
			}
			if err != nil {
				// A peer that cannot do it is no reason not to measure others.
				fmt.Printf("%s: %s fails: %s\n", w.name, e.name(), lastLine(err))
				failed[i] = true
				continue
			}
			if round > 0 { // the first warms up
				took[i] = append(took[i], d/time.Duration(max(1, w.parts)))
			}
		}
	}
	row := []string{w.name}
	for i := range t.engines {
		if failed[i] {
			row = append(row, "failed", "", "")
			continue
		}
		row = append(row, bench.MS(took[i].At(50)), bench.MS(took[i].At(100)))
		if i > 0 {
			row = append(row, bench.Ratio(took[i].At(50), took[0].At(50)))
		}
	}
	fmt.Println(strings.Join(row, "  "))
	return row, nil
}

// lastLine is what a command said last.
func lastLine(err error) string {
	lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
	return lines[len(lines)-1]
}

func (t *trial) once(ctx context.Context, w workload, e engine, dir string, round int) (time.Duration, error) {
	fresh := ""
	if w.fresh {
		fresh = fmt.Sprintf("%s-%d", w.name, round)
	}
	if !w.export {
		begin := time.Now()
		err := e.build(ctx, dir, fresh)
		return time.Since(begin), err
	}
	if err := e.build(ctx, dir, fresh); err != nil {
		return 0, err
	}
	file := filepath.Join(t.Dir, "exported")
	defer os.Remove(file)
	begin := time.Now()
	err := e.export(ctx, dir, fresh, file)
	return time.Since(begin), err
}

func (t *trial) dockerfile(dir string, lines ...string) error {
	text := "FROM " + t.base + "\n" + strings.Join(lines, "\n") + "\n"
	return os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o644)
}

// thirtySteps has 26 steps before a source file is copied and three after that.
func thirtySteps(t *trial, dir string) error {
	var lines []string
	for i := range 26 {
		lines = append(lines, fmt.Sprintf("RUN echo %d > /step%d", i, i))
	}
	lines = append(lines, "COPY source /source", "RUN cp /source /built", "RUN ls / > /list")
	if err := t.dockerfile(dir, lines...); err != nil {
		return err
	}
	return changeSource(dir, 0)
}

// changeSource changes one file of a context.
func changeSource(dir string, round int) error {
	return os.WriteFile(filepath.Join(dir, "source"), fmt.Appendf(nil, "round %d at %d\n", round, time.Now().UnixNano()), 0o644)
}

func hundredRuns(t *trial, dir string) error {
	lines := []string{"ARG FRESH"}
	for i := range 100 {
		lines = append(lines, fmt.Sprintf("RUN true # %d", i))
	}
	return t.dockerfile(dir, lines...)
}

func diamond(t *trial, dir string) error {
	lines := []string{"ARG FRESH", "RUN true"}
	join := []string{"FROM scratch"}
	for i := range 50 {
		lines = append(lines, fmt.Sprintf("FROM %s AS side%d\nARG FRESH\nRUN echo %d > /side%d", t.base, i, i, i))
		join = append(join, fmt.Sprintf("COPY --from=side%d /side%d /", i, i))
	}
	return t.dockerfile(dir, append(lines, join...)...)
}

// manyFiles is a context of 20,000 files of 1 KiB in 200 directories.
func manyFiles(t *trial, dir string) error {
	for d := range 200 {
		at := filepath.Join(dir, fmt.Sprintf("dir%d", d))
		if err := os.Mkdir(at, 0o755); err != nil {
			return err
		}
		for f := range 100 {
			data := strings.Repeat(fmt.Sprintf("%d of %d\n", f, d), 200)[:1024]
			if err := os.WriteFile(filepath.Join(at, fmt.Sprintf("file%d", f)), []byte(data), 0o644); err != nil {
				return err
			}
		}
	}
	if err := changeSource(dir, 0); err != nil {
		return err
	}
	return t.dockerfile(dir, "COPY . /src", "RUN ls /src > /list")
}

// bigLayer is 1 GB: half of it random, half the same line.
func bigLayer(t *trial, dir string) error {
	return t.dockerfile(dir, "ARG FRESH", "RUN head -c 256000000 /dev/urandom > /a && cat /a > /b && yes varve | head -c 488000000 > /c")
}
