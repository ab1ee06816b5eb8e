package limittest

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"varve.dev/daemon"
	"varve.dev/fsck"
	"varve.dev/gc"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

func TestMain(m *testing.M) {
	code := m.Run()
	testkit.RemoveBinaries()
	os.Exit(code)
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// number is what the environment asks for, or otherwise.
func number(t *testing.T, variable string, otherwise int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	must(t, err)
	return n
}

// open opens a store with limits, and closes and checks it at the end.
func open(t *testing.T, limits gc.Limits) (*daemon.Engine, string) {
	t.Helper()
	testkit.NeedRoot(t)
	bin := testkit.Binaries(t)
	t.Setenv("VARVE_RUNTIME", filepath.Join(bin, "varve-runtime"))
	dir := filepath.Join(t.TempDir(), "store")
	e, err := daemon.Open(t.Context(), daemon.Options{Root: dir, State: t.TempDir(), Limits: limits})
	must(t, err)
	t.Cleanup(func() {
		ctx := context.Background()
		must(t, e.Close(ctx))
		report, err := fsck.Run(ctx, fsck.Options{Root: dir, Level: layout.Deep})
		must(t, err)
		for _, f := range report.Findings {
			t.Errorf("%s %s at %q: %s", f.Invariant, f.Object, f.Path, f.Detail)
		}
	})
	return e, dir
}

// watch is what was seen of a store's size while it was worked.
type watch struct {
	limit int64
	most  int64 // bytes, without what is in flight
	looks int
	over  []int64

	stop chan struct{}
	done sync.WaitGroup
}

// every is the time between two looks: the promise says a second.
const every = 100 * time.Millisecond

// watched looks at a store until end is called. Steps that run write to active;
// what they have written is in flight.
func watched(dir string, limit int64) *watch {
	w := &watch{limit: limit, stop: make(chan struct{})}
	w.done.Go(func() {
		for {
			w.look(dir)
			select {
			case <-w.stop:
				return
			case <-time.After(every):
			}
		}
	})
	return w
}

// look counts once, and again if it was too much: what is renamed while it is
// counted is counted twice.
func (w *watch) look(dir string) {
	bytes := settled(dir)
	for range 3 {
		if bytes <= w.limit {
			break
		}
		bytes = min(bytes, settled(dir))
	}
	w.looks++
	w.most = max(w.most, bytes)
	if bytes > w.limit {
		w.over = append(w.over, bytes)
	}
}

func (w *watch) end(t *testing.T) {
	t.Helper()
	close(w.stop)
	w.done.Wait()
	t.Logf("limit %d bytes, at most %d were taken (%.2f of it) in %d looks", w.limit, w.most, float64(w.most)/float64(w.limit), w.looks)
	if len(w.over) > 0 {
		t.Errorf("%d of %d looks saw more than the limit of %d: %v", len(w.over), w.looks, w.limit, w.over)
	}
}

// settled is what a store takes, but for writable layers.
func settled(dir string) (bytes int64) {
	return taken(dir, filepath.Join(dir, layout.ActiveDir), func(fs.FileInfo) {})
}

// taken is what is allocated below dir, as du counts it, without skip; each is told
// of every name. What goes meanwhile does not count.
func taken(dir, skip string, each func(fs.FileInfo)) (bytes int64) {
	seen := map[uint64]bool{}
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if path == skip {
			return fs.SkipDir
		}
		fi, err := d.Info()
		if err != nil {
			return nil
		}
		each(fi)
		if st := fi.Sys().(*syscall.Stat_t); !seen[st.Ino] {
			seen[st.Ino] = true
			bytes += st.Blocks * 512
		}
		return nil
	})
	return bytes
}

func write(t *testing.T, path, text string) {
	t.Helper()
	must(t, os.WriteFile(path, []byte(text), 0o644))
}
