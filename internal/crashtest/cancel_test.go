package crashtest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/internal/testbuild"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// TestCalledOffAtEveryPoint calls operations off at each fault point that they
// pass, the last time they do, and on demand at every time, as a client does
// that is killed. The process that has the store open goes on, and cleans up by
// itself, without a recovery.
func TestCalledOffAtEveryPoint(t *testing.T) {
	at := newPlace(t, 3, 10)
	t.Setenv("VARVE_RUNTIME", at.shim)
	at.registry.Push(t, testkit.Stacked(t, 2, 40), bigName)
	for _, op := range []struct {
		name string
		do   func(context.Context, *work) error
	}{
		{"pull", func(ctx context.Context, w *work) error { return w.pull(bigName)(ctx) }},
		{"build", buildAnew},
		{"load", func(ctx context.Context, w *work) error {
			_, err := w.Load(ctx, bytes.NewReader(w.archive), nil)
			return err
		}},
		{"container", makeAndRemove},
	} {
		t.Run(op.name, func(t *testing.T) {
			c := calledOff{place: at, dir: filepath.Join(t.TempDir(), "root"), do: op.do}
			c.supply(t)
			passed := c.once(t, "", 0)
			ends := 0
			for point, n := range passed.n {
				from := n
				if os.Getenv("VARVE_ALL_CRASHES") != "" {
					from = 1
				}
				for count := from; count <= n; count++ {
					if c.once(t, point, count); t.Failed() {
						t.Fatalf("called off at %s, occurrence %d", point, count)
					}
					ends++
				}
			}
			t.Logf("called off %d times at %d points", ends, len(passed.n))
		})
	}
}

// calledOff is an operation on a store that is there from time to time.
type calledOff struct {
	place
	dir     string
	archive []byte // with the big image
	do      func(context.Context, *work) error
}

// supply makes the store, with the images that the operations need.
func (c *calledOff) supply(t *testing.T) {
	t.Helper()
	var archive bytes.Buffer
	c.open(t, func(w *work) {
		must(t, errors.Join(w.pull(smallName)(t.Context()), w.tag(c.remote+"/"+smallName, builtName)(t.Context()), w.pull(bigName)(t.Context())))
		must(t, w.Save(t.Context(), varve.SaveRequest{Names: []string{c.remote + "/" + bigName}}, &archive))
	})
	c.archive = archive.Bytes()
}

// open has fn use the store, and looks at what is left when it is closed.
func (c *calledOff) open(t *testing.T, fn func(*work)) {
	t.Helper()
	e, err := daemon.Open(t.Context(), daemon.Options{Root: c.dir, State: c.state})
	must(t, err)
	fn(&work{Engine: e, dir: c.dir, remote: c.remote, state: c.state, archive: c.archive, mark: func(string, ...any) {}})
	must(t, e.Close(context.Background()))
	report, err := fsck.Run(t.Context(), fsck.Options{Root: c.dir, Level: layout.Normal})
	must(t, err)
	for _, f := range report.Findings {
		t.Errorf("finding %s %s %s: %s", f.Invariant, f.Severity, f.Object, f.Detail)
	}
	r, err := readRecords(c.dir)
	must(t, err)
	for _, wrong := range append(underWay(r), leftovers(c.dir)...) {
		t.Error(wrong)
	}
}

// once calls the operation off at an occurrence of a fault point, and counts
// those that it passes.
func (c *calledOff) once(t *testing.T, point string, count int) *counter {
	t.Helper()
	var passed counter
	c.open(t, func(w *work) {
		_, err := w.Remove(t.Context(), varve.RemoveRequest{Name: c.remote + "/" + bigName})
		if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			t.Error(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		durable.OnPoint(func(at string) {
			if passed.add(at) == count && at == point {
				cancel()
			}
		})
		err = c.do(ctx, w)
		durable.OnPoint(nil)
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("it ends with %v", err)
		}
	})
	return &passed
}

// makeAndRemove makes a container, and removes it.
func makeAndRemove(ctx context.Context, w *work) error {
	c, err := w.Create(ctx, varve.CreateRequest{Image: builtName, Command: []string{"true"}}, nil)
	if err != nil {
		return err
	}
	return w.RemoveContainer(ctx, c.ID)
}

// buildAnew builds with a cache mount that is always a new one.
func buildAnew(ctx context.Context, w *work) error {
	from := "FROM " + w.remote + "/" + smallName
	dockerfile := from + " AS files\nRUN echo " + layout.NewID() + " > /here\n" +
		from + "\nRUN --mount=type=cache,from=files,source=/here,target=/cache cp -r /cache /copy\n"
	_, err := testbuild.Run(ctx, w, testbuild.Build{Name: "anew", Dockerfile: dockerfile})
	return err
}
