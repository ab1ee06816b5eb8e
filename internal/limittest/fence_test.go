package limittest

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/gc"
	"varve.dev/internal/testbuild"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// fenced is a store, and what is done to it while something else stands still.
type fenced struct {
	e        *daemon.Engine
	registry *testkit.RegistryServer
	dir      string // of a build context
}

func newFenced(t *testing.T) *fenced {
	t.Helper()
	e, _ := open(t, gc.Limits{})
	f := &fenced{e: e, registry: testkit.Registry(t), dir: t.TempDir()}
	img := testkit.Stacked(t, 3, 10)
	f.registry.Push(t, img, "image:1")
	f.registry.Push(t, img, "image:2") // the same blobs
	f.registry.Push(t, testkit.Busybox(t), "base:1")
	write(t, filepath.Join(f.dir, "Dockerfile"), "FROM "+f.registry.Ref("base:1")+"\nCOPY file /file\nRUN echo more >> /file\n")
	write(t, filepath.Join(f.dir, "file"), "content")
	return f
}

func (f *fenced) pull(name string) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := f.e.Pull(ctx, varve.PullRequest{Reference: f.registry.Ref(name), Registry: varve.Registry{PlainHTTP: true}}, nil)
		return err
	}
}

func (f *fenced) build(ctx context.Context) error {
	_, err := testbuild.Run(ctx, f.e, testbuild.Build{Name: "built", Dir: f.dir, Registry: varve.Registry{PlainHTTP: true}})
	return err
}

func (f *fenced) create(ctx context.Context) error {
	c, err := f.e.Create(ctx, varve.CreateRequest{Image: f.registry.Ref("image:1"), Command: []string{"true"}, Registry: varve.Registry{PlainHTTP: true}}, nil)
	if err == nil {
		err = f.e.RemoveContainer(ctx, c.ID)
	}
	return err
}

// commit makes an image of a container.
func (f *fenced) commit(ctx context.Context) error {
	c, err := f.e.Create(ctx, varve.CreateRequest{Image: f.registry.Ref("base:1"), Command: []string{"true"}, Registry: varve.Registry{PlainHTTP: true}}, nil)
	if err != nil {
		return err
	}
	_, err = f.e.Commit(ctx, varve.CommitRequest{Container: c.ID, Name: "committed"})
	return errors.Join(err, f.e.RemoveContainer(ctx, c.ID))
}

// sweep removes every name and every build result, as far as it gets.
func (f *fenced) sweep(ctx context.Context) error {
	list, err := f.e.List(ctx)
	for _, i := range list {
		if _, rerr := f.e.Remove(ctx, varve.RemoveRequest{Name: i.Name}); !errors.Is(rerr, errdefs.ErrNotFound) {
			err = errors.Join(err, rerr)
		}
	}
	small := int64(1)
	_, cerr := f.e.Collect(ctx, varve.CollectRequest{Cache: &small})
	return errors.Join(err, cerr)
}

// meet runs one thing, and another whenever it comes to a point for the first
// time, and waits for that as long as it gets on. It returns the points.
func meet(t *testing.T, ctx context.Context, one, other func(context.Context) error) (points []string) {
	t.Helper()
	turn := make(chan struct{}, 1) // held while the other runs: its own points do not count
	var others []chan error
	durable.OnPoint(func(point string) {
		select {
		case turn <- struct{}{}:
		default:
			return
		}
		if slices.Contains(points, point) {
			<-turn
			return
		}
		points = append(points, point)
		done := make(chan error, 1)
		others = append(others, done)
		go func() {
			done <- other(ctx)
			<-turn
		}()
		select {
		case err := <-done:
			done <- err
		case <-time.After(time.Second): // it waits for whoever stands here
		}
	})
	err := one(ctx)
	turn <- struct{}{}
	durable.OnPoint(nil)
	<-turn
	if err != nil {
		t.Errorf("beside the other: %v", err)
	}
	for _, done := range others {
		if err := <-done; err != nil {
			t.Errorf("the other: %v", err)
		}
	}
	return points
}

// TestSweepInEverything removes all that there is at every point of a pull, a
// build, a commit and a run, and does each of these at every point of a removal.
// Both end well, and the witness finds nothing: what one of them needs and the
// other removed is brought again.
func TestSweepInEverything(t *testing.T) {
	for name, what := range map[string]func(*fenced) func(context.Context) error{
		"pull":   func(f *fenced) func(context.Context) error { return f.pull("image:1") },
		"again":  func(f *fenced) func(context.Context) error { return f.pull("image:2") },
		"build":  func(f *fenced) func(context.Context) error { return f.build },
		"commit": func(f *fenced) func(context.Context) error { return f.commit },
		"create": func(f *fenced) func(context.Context) error { return f.create },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFenced(t)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			do := what(f)
			if name == "again" {
				must(t, f.pull("image:1")(ctx))
			}
			inside := meet(t, ctx, do, f.sweep)
			must(t, do(ctx), f.pull("image:1")(ctx), f.build(ctx))
			beside := meet(t, ctx, f.sweep, do)
			must(t, do(ctx))
			t.Logf("swept at %v; done at %v", inside, beside)
			if !slices.Contains(inside, layout.PointPublishIntended) || !slices.Contains(beside, layout.PointSweepClaimed) {
				t.Error("the points that matter did not come")
			}
		})
	}
}
