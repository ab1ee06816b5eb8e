package limittest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/errdefs"
	"varve.dev/gc"
	"varve.dev/internal/testbuild"
	"varve.dev/internal/testkit"
)

const mib = 1 << 20

// TestBuildsWithinACap makes BUILDS different builds in a store that has room for
// few of them: each brings a context of its own and writes some MiB, two at a
// time, and the last one is still in the cache.
func TestBuildsWithinACap(t *testing.T) {
	for name, limits := range map[string]gc.Limits{
		"store": {Size: 96 * mib},
		"cache": {Cache: 48 * mib},
	} {
		t.Run(name, func(t *testing.T) {
			e, dir := open(t, limits)
			base := load(t, e, testkit.Busybox(t))
			limit := limits.Size
			if limit == 0 {
				// Beside the cache: the base; of each of two builds what its image
				// needs, as trees and as blobs, and as much again that the next one
				// holds while it runs.
				limit = limits.Cache + settled(dir) + 2*2*13*mib
			}
			w := watched(dir, limit)
			n := number(t, "BUILDS", 12)
			var g errgroup.Group
			for worker := range 2 {
				g.Go(func() error {
					for i := worker; i < n; i += 2 {
						if _, err := build(t, e, base, i, worker); err != nil {
							return fmt.Errorf("build %d: %w", i, err)
						}
					}
					return nil
				})
			}
			must(t, g.Wait())
			w.end(t)
			again, err := build(t, e, base, n-1, (n-1)%2)
			must(t, err)
			if again.Ran != 0 {
				t.Errorf("the last build was evicted: %+v", again)
			}
			if limits.Size > 0 && w.most < limits.Size/2 {
				t.Errorf("only %d bytes were used of %d", w.most, limits.Size)
			}
		})
	}
}

// build makes build i, which is like no other.
func build(t *testing.T, e *daemon.Engine, base string, i, worker int) (testbuild.Result, error) {
	dir := t.TempDir()
	content := make([]byte, 1*mib)
	random := rand.NewChaCha8([32]byte{byte(i), byte(i >> 8), 1})
	_, _ = random.Read(content)
	dockerfile := fmt.Sprintf("FROM %s\nCOPY content /content\nRUN head -c %d /dev/urandom > /written && echo %d\nRUN echo on top >> /content\n", base, (2+i%3)*mib, i)
	err := errors.Join(
		os.WriteFile(filepath.Join(dir, "content"), content, 0o644),
		os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644),
	)
	if err != nil {
		return testbuild.Result{}, err
	}
	// The image of each build takes the name from the one before.
	return testbuild.Run(t.Context(), e, testbuild.Build{Name: fmt.Sprintf("app%d:latest", worker), Dir: dir})
}

func load(t *testing.T, e *daemon.Engine, img testkit.Image) string {
	t.Helper()
	archive := img.Archive()
	defer archive.Close()
	loaded, err := e.Load(t.Context(), archive, nil)
	must(t, err)
	return loaded[0].Name
}

// TestPullsWithinACap makes PULLS pulls of many images, some of them much more
// often than others, four at a time, in a store that has room for few and evicts
// the longest unused.
func TestPullsWithinACap(t *testing.T) {
	const images, layerMiB = 40, 3
	limits := gc.Limits{Size: 64 * mib, Images: gc.EvictImages}
	e, dir := open(t, limits)
	registry := testkit.Registry(t)
	shared := random(layerMiB*mib, 255)
	for i := range images {
		registry.Push(t, image(t, fmt.Sprint("image", i), shared, random(layerMiB*mib, byte(i))), fmt.Sprintf("image%d:1", i))
	}
	w := watched(dir, limits.Size)
	n := number(t, "PULLS", 80)
	var pulled, there atomic.Int64
	var g errgroup.Group
	for worker := range uint64(4) {
		g.Go(func() error {
			r := rand.New(rand.NewPCG(worker, 5))
			zipf := rand.NewZipf(r, 1.3, 1, images-1)
			for range n / 4 {
				ref := registry.Ref(fmt.Sprintf("image%d:1", zipf.Uint64()))
				_, err := e.Inspect(t.Context(), ref)
				if err == nil {
					there.Add(1)
				}
				if _, err := e.Pull(t.Context(), varve.PullRequest{Reference: ref, Registry: varve.Registry{PlainHTTP: true}}, nil); err != nil {
					return err
				}
				pulled.Add(1)
			}
			return nil
		})
	}
	must(t, g.Wait())
	w.end(t)
	t.Logf("%d pulls of %d images, %d of them were there", pulled.Load(), images, there.Load())
	if there.Load() == 0 {
		t.Error("nothing was kept")
	}
}

// random makes bytes that nothing compresses.
func random(size int, seed byte) []byte {
	out := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{seed, 7}).Read(out)
	return out
}

// image is one with a layer for each content.
func image(t *testing.T, name string, contents ...[]byte) testkit.Image {
	t.Helper()
	l, err := testkit.NewLayout(t.TempDir())
	must(t, err)
	var layers []testkit.Layer
	for i, c := range contents {
		layer, err := l.AddLayer(testkit.Gzip, fmt.Sprint(name, i), func(b *testkit.LayerBuilder) {
			b.File(fmt.Sprint("file", i), 0o644, c)
		})
		must(t, err)
		layers = append(layers, layer)
	}
	manifest, err := l.AddImage(ocispec.ImageConfig{}, layers...)
	must(t, err)
	img, err := l.Finish(name+":1", manifest)
	must(t, err)
	return img
}

// A pull that cannot fit says so, and why, before anything of it is unpacked;
// one that fits when others have gone makes them go.
func TestPullThatCannotFit(t *testing.T) {
	limits := gc.Limits{Size: 24 * mib}
	e, dir := open(t, limits)
	registry := testkit.Registry(t)
	registry.Push(t, image(t, "big", random(14*mib, 1)), "big:1")
	registry.Push(t, image(t, "small", random(4*mib, 2)), "small:1")
	pull := func(name string) error {
		_, err := e.Pull(t.Context(), varve.PullRequest{Reference: registry.Ref(name), Registry: varve.Registry{PlainHTTP: true}}, func(ev varve.Event) {
			if name == "big:1" && (ev.Phase == varve.Downloading || ev.Phase == varve.Unpacking) {
				t.Errorf("%s: %s", ev.Name, ev.Phase)
			}
		})
		return err
	}
	must(t, pull("small:1"))
	before := settled(dir)
	err := pull("big:1")
	if !errors.Is(err, errdefs.ErrResourceExhausted) || !strings.Contains(fmt.Sprint(err), "its limit is 25.2MB") {
		t.Errorf("a pull of 28 MiB into 24: %v", err)
	}
	if after := settled(dir); after > before+mib {
		t.Errorf("%d bytes before, %d after", before, after)
	}
	if _, err := e.Inspect(t.Context(), registry.Ref("small:1")); err != nil {
		t.Errorf("an image was removed for it: %v", err)
	}
}

// What is free on the file system stays free.
func TestFloorOfFreeSpace(t *testing.T) {
	disk := testkit.Ext4(t, 96)
	testkit.NeedRoot(t)
	e, err := daemon.Open(t.Context(), daemon.Options{Root: filepath.Join(disk.Dir, "store"), State: t.TempDir(), Limits: gc.Limits{Free: 40 * mib}})
	must(t, err)
	defer e.Close(context.Background())
	registry := testkit.Registry(t)
	var refused error
	for i := range 16 {
		name := fmt.Sprintf("image%d:1", i)
		registry.Push(t, image(t, "image", random(4*mib, byte(i))), name)
		if _, err := e.Pull(t.Context(), varve.PullRequest{Reference: registry.Ref(name), Registry: varve.Registry{PlainHTTP: true}}, nil); err != nil {
			refused = err
			break
		}
		u, err := e.DiskUsage(t.Context(), varve.DiskUsageRequest{})
		must(t, err)
		if u.Free < 40*mib {
			t.Errorf("after %d pulls only %d bytes are free", i+1, u.Free)
		}
	}
	if !errors.Is(refused, errdefs.ErrResourceExhausted) {
		t.Errorf("all of them fit into 96 MiB of which 40 are to stay free: %v", refused)
	}
}
