package crashtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"varve.dev/daemon"
	"varve.dev/durable"
	"varve.dev/fsck"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// again asks recoverStore to use the store when it has recovered it.
const again = "again"

// recoverStore opens what is left of a store, twice, and tells which images
// and containers are there, what is in the layers, and what the witness finds.
// args are those of place, and perhaps again.
func recoverStore(dir string, args []string, mark func(string, ...any)) error {
	ctx := context.Background()
	for round := range 2 {
		var names []string
		e, err := daemon.Open(ctx, daemon.Options{Root: dir, State: args[0], Opened: func(_ *durable.Root, db *metadata.DB) {
			names = containerNames(ctx, db)
		}})
		if err != nil {
			return fmt.Errorf("open, round %d: %w", round+1, err)
		}
		mark("started")
		for _, name := range names {
			mark("there %d %s%s", round, containerPrefix, name)
		}
		err = tellImages(ctx, e, round, mark)
		if err == nil && round == 1 && slices.Contains(args, again) {
			err = useAgain(ctx, &work{Engine: e, dir: dir, remote: args[1], state: args[0], mark: mark})
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

// useAgain pulls and builds in a recovered store.
func useAgain(ctx context.Context, w *work) error {
	pull := func(through *work) step { return through.pull(stackedName) }
	return errors.Join(w.fetched(ctx, pull), w.pull(stackedName)(ctx), w.build(builtName, 2)(ctx))
}

// fetched takes a step through a registry of another name, which is the same
// one, and tells how many bytes of blobs came from there.
func (w *work) fetched(ctx context.Context, what func(through *work) step) error {
	var n atomic.Int64
	counting := httptest.NewServer(countBodies(w.remote, &n))
	defer counting.Close()
	through := *w
	through.remote = counting.Listener.Addr().String()
	err := what(&through)(ctx)
	w.mark("fetched %d", n.Load())
	return err
}

// countBodies passes requests on to a registry and counts the bytes of blobs.
func countBodies(registry string, n *atomic.Int64) http.Handler {
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry})
	proxy.ModifyResponse = func(r *http.Response) error {
		if strings.Contains(r.Request.URL.Path, "/blobs/") {
			r.Body = &counted{r.Body, n}
		}
		return nil
	}
	return proxy
}

type counted struct {
	io.ReadCloser
	n *atomic.Int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
	return n, err
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
		mark("there %d %s", round, img.Name)
	}
	return nil
}

// containerPrefix tells containers from images, where both are told of.
const containerPrefix = "container:"

func containerNames(ctx context.Context, db *metadata.DB) (names []string) {
	_ = db.View(ctx, func(tx *metadata.Tx) error {
		return tx.Containers().Each("", func(_ layout.ContainerID, c layout.ContainerRecord) error {
			names = append(names, c.Name)
			return nil
		})
	})
	return names
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
// that was not being changed, an image's or a container's, whether it is there.
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
	size   int64             // of the image's blobs, in bytes
}

func factsOf(lines []string) facts {
	f := facts{layers: map[string]string{}, points: map[string]int{}}
	for _, line := range lines {
		switch w := strings.Fields(line); w[0] {
		case "layer":
			f.layers[w[1]] = w[2]
		case "point":
			f.points[w[1]], _ = strconv.Atoi(w[2])
		case "size":
			f.size, _ = strconv.ParseInt(w[1], 10, 64)
		}
	}
	return f
}

// found is what a recovered store was found to be.
type found struct {
	started bool
	again   bool  // it was used again
	fetched int64 // for that, in bytes
	wrong   []string
}

// judge recovers the store in dir and compares it with what was told and is
// known. With again, what is recovered is used.
func (p place) judge(dir string, told ledger, known facts, useAgain bool) (f found) {
	args := []string{p.state, p.remote}
	if useAgain {
		args = append(args, again)
	}
	there := [2]map[string]bool{{}, {}}
	w := p.worker("recover")
	w.Mark = func(m string) {
		switch word := strings.Fields(m); word[0] {
		case "started":
			f.started = true
		case "there":
			round, _ := strconv.Atoi(word[1])
			there[round][word[2]] = true
		case "fetched":
			f.again = true
			f.fetched, _ = strconv.ParseInt(word[1], 10, 64)
		case "finding":
			f.wrong = append(f.wrong, m)
		case "layer":
			if hash, ok := known.layers[word[1]]; ok && hash != word[2] {
				f.wrong = append(f.wrong, "layer "+word[1]+" is not what it was")
			}
		}
	}
	err := w.Run(dir, args...)
	for name, want := range told {
		for round := range there {
			if f.started && there[round][name] != want {
				f.wrong = append(f.wrong, fmt.Sprintf("opening %d: %s there: %t, acknowledged: %t", round+1, name, there[round][name], want))
			}
		}
	}
	// Nothing is fetched twice, and nothing that is there.
	most := known.size
	if told[p.remote+"/"+stackedName] {
		most = 0
	}
	if known.size > 0 && f.fetched > most+documents {
		f.wrong = append(f.wrong, fmt.Sprintf("%d bytes were fetched again, at most %d were missing", f.fetched, most))
	}
	if err != nil {
		f.wrong = append(f.wrong, err.Error())
	}
	slices.Sort(f.wrong)
	return f
}

// documents is more than an image's config takes.
const documents = 64 << 10

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
