package crashtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"varve.dev/daemon"
	"varve.dev/fsck"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// again asks recoverStore to use the store when it has recovered it.
const again = "again"

// recoverStore opens what is left of a store, twice, and tells which images
// are there, what is in the layers, and what the witness finds. args are those
// of place, and perhaps again.
func recoverStore(dir string, args []string, mark func(string, ...any)) error {
	ctx := context.Background()
	for round := range 2 {
		e, err := daemon.Open(ctx, daemon.Options{Root: dir, State: args[0]})
		if err != nil {
			return fmt.Errorf("open, round %d: %w", round+1, err)
		}
		err = tellImages(ctx, e, round, mark)
		if err == nil && round == 1 && slices.Contains(args, again) {
			w := &work{Engine: e, dir: dir, remote: args[1], state: args[0], mark: mark}
			err = errors.Join(w.pull(stackedName)(ctx), w.build(ctx))
		}
		if err := errors.Join(err, e.Close(ctx)); err != nil {
			return err
		}
	}
	report, err := fsck.Run(ctx, fsck.Options{Root: dir, Level: layout.Deep})
	if err != nil {
		return err
	}
	for _, f := range report.Findings {
		mark("finding %s %s %s: %s", f.Invariant, f.Severity, f.Object, f.Detail)
	}
	r, err := readRecords(dir)
	if err != nil {
		return err
	}
	for _, left := range slices.Concat(underWay(r), leftovers(dir), useless(dir, r)) {
		mark("finding %s", left)
	}
	return eachLayer(dir, func(id, hash string) { mark("layer %s %s", id, hash) })
}

func tellImages(ctx context.Context, e *daemon.Engine, round int, mark func(string, ...any)) error {
	images, err := e.List(ctx)
	if err != nil {
		return err
	}
	for _, img := range images {
		if _, err := e.Inspect(ctx, img.Name); err != nil {
			return err
		}
		mark("image %d %s", round, img.Name)
	}
	return nil
}

// eachLayer calls fn with the hash of every layer's tree.
func eachLayer(dir string, fn func(id, hash string)) error {
	layers, err := os.ReadDir(filepath.Join(dir, layout.LayersDir))
	if err != nil {
		return err
	}
	for _, l := range layers {
		hash, err := testkit.HashTree(filepath.Join(dir, layout.LayersDir, l.Name(), layout.TreeDir))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return err
		}
		fn(l.Name(), hash)
	}
	return nil
}

// ledger is what the workload was told by the time of a cut: of each name
// that was not being changed, whether it is there.
type ledger map[string]bool

func ledgerOf(marks []string) ledger {
	l := ledger{}
	for _, m := range marks {
		f := strings.Fields(m)
		switch f[0] {
		case "will":
			delete(l, f[1][1:])
		case "did":
			l[f[1][1:]] = f[1][0] == '+'
		}
	}
	return l
}

// facts are what a workload told that is true at any time.
type facts struct {
	layers map[string]string // id → hash: a layer never changes
	points map[string]int    // fault point → how often it was passed
}

func factsOf(lines []string) facts {
	f := facts{layers: map[string]string{}, points: map[string]int{}}
	for _, line := range lines {
		switch w := strings.Fields(line); w[0] {
		case "layer":
			f.layers[w[1]] = w[2]
		case "point":
			f.points[w[1]], _ = strconv.Atoi(w[2])
		}
	}
	return f
}

// wrong returns what an aftermath, as recoverStore told it, should not be.
func (l ledger) wrong(aftermath []string, known facts) (wrong []string) {
	for round := range 2 {
		there := map[string]bool{}
		for _, m := range aftermath {
			if f := strings.Fields(m); f[0] == "image" && f[1] == strconv.Itoa(round) {
				there[f[2]] = true
			}
		}
		for name, want := range l {
			if there[name] != want {
				wrong = append(wrong, fmt.Sprintf("opening %d: %s there: %t, acknowledged: %t", round+1, name, there[name], want))
			}
		}
	}
	for _, m := range aftermath {
		switch f := strings.Fields(m); f[0] {
		case "finding":
			wrong = append(wrong, m)
		case "layer":
			if hash, ok := known.layers[f[1]]; ok && hash != f[2] {
				wrong = append(wrong, "layer "+f[1]+" is not what it was")
			}
		}
	}
	slices.Sort(wrong)
	return wrong
}

// judge recovers the store in dir and returns what is wrong with it.
func (p place) judge(dir string, told ledger, known facts, args ...string) []string {
	var aftermath []string
	w := p.worker("recover")
	w.Mark = func(m string) { aftermath = append(aftermath, m) }
	err := w.Run(dir, append([]string{p.state, p.remote}, args...)...)
	wrong := told.wrong(aftermath, known)
	if err != nil {
		wrong = append(wrong, err.Error())
	}
	return wrong
}

// counter counts by name, from several goroutines.
type counter struct {
	mu sync.Mutex
	n  map[string]int
}

func (c *counter) add(name string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == nil {
		c.n = map[string]int{}
	}
	c.n[name]++
	return c.n[name]
}

func (c *counter) each(fn func(name string, n int)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, n := range c.n {
		fn(name, n)
	}
}
