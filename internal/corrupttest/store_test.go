package corrupttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/internal/testbuild"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
	"varve.dev/runtime"
)

func TestMain(m *testing.M) {
	code := m.Run()
	testkit.RemoveBinaries()
	os.Exit(code)
}

// place is a registry with images, and what it takes to run varve.
type place struct {
	registry *testkit.RegistryServer
	bin      string
	state    string
}

// The images in the registry.
const (
	awkwardName = "awkward:1"
	stackedName = "stacked:1"
	smallName   = "small:1"
	indexName   = "index:1"
	restName    = "rest:1"
)

func newPlace(t *testing.T) place {
	t.Helper()
	testkit.NeedRoot(t)
	p := place{registry: testkit.Registry(t), bin: testkit.Binaries(t), state: t.TempDir()}
	t.Setenv("VARVE_RUNTIME", filepath.Join(p.bin, "varve-runtime"))
	p.registry.Push(t, testkit.Awkward(t), awkwardName)
	p.registry.Push(t, testkit.Stacked(t, 4, 20), stackedName)
	p.registry.Push(t, testkit.Busybox(t), smallName)
	p.registry.Push(t, rest(t), restName)
	p.registry.Push(t, platforms(t), indexName)
	return p
}

// rest is an image that is never pulled whole.
func rest(t *testing.T) testkit.Image { return testkit.Stacked(t, 2, 3) }

// platforms is an image for this machine and for another.
func platforms(t *testing.T) testkit.Image {
	t.Helper()
	l, err := testkit.NewLayout(t.TempDir())
	must(t, err)
	var children []ocispec.Descriptor
	for _, arch := range []string{"amd64", "riscv64"} {
		layer, err := l.AddLayer(testkit.Gzip, arch, func(b *testkit.LayerBuilder) {
			b.Dir("dir", 0o755)
			b.Text("dir/arch", arch)
			b.Hardlink("dir/again", "dir/arch")
		})
		must(t, err)
		manifest, err := l.AddImage(ocispec.ImageConfig{Cmd: []string{arch}}, layer)
		must(t, err)
		manifest.Platform.Architecture = arch
		children = append(children, manifest)
	}
	index, err := l.AddIndex(children...)
	must(t, err)
	image, err := l.Finish(indexName, index)
	must(t, err)
	return image
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// op is something that a store is asked to do.
type op func(ctx context.Context, e *daemon.Engine) error

func (p place) ref(name string) string { return p.registry.Ref(name) }

func (p place) pull(name string) op {
	return func(ctx context.Context, e *daemon.Engine) error {
		_, err := e.Pull(ctx, varve.PullRequest{Reference: p.ref(name), Registry: varve.Registry{PlainHTTP: true}}, nil)
		return err
	}
}

func tag(source, target string) op {
	return func(ctx context.Context, e *daemon.Engine) error {
		return e.Tag(ctx, varve.TagRequest{Source: source, Target: target})
	}
}

// build builds an image whose steps differ with number from some layer on.
func (p place) build(name string, number int) op {
	return func(ctx context.Context, e *daemon.Engine) error {
		files, err := os.MkdirTemp(filepath.Dir(p.state), "context-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(files)
		for i := range 4 {
			if err := os.WriteFile(filepath.Join(files, fmt.Sprintf("file-%d", i)), []byte(strings.Repeat(fmt.Sprintf("line %d\n", i), 500)), 0o644); err != nil {
				return err
			}
		}
		dockerfile := fmt.Sprintf(`FROM %[1]s AS files
COPY file-* /some/
RUN rm /some/file-0 && mkdir /ran && echo here >/ran/it
FROM %[1]s
COPY --from=files /some /some
RUN --mount=type=cache,target=/cache echo %[2]d >>/cache/log && echo %[2]d >/number && ln /number /etc/number
RUN rm -r /home /bin/busybox.old; chown -R 1000:1000 /some; rm /some/file-1
LABEL built=here
`, p.ref(smallName), number)
		_, err = testbuild.Run(ctx, e, testbuild.Build{
			Name: name, Dockerfile: dockerfile, Dir: files, Registry: varve.Registry{PlainHTTPHosts: []string{p.registry.Addr}},
		})
		return err
	}
}

// create makes a container that has written something.
func create(image, name string) op {
	return func(ctx context.Context, e *daemon.Engine) error {
		c, err := e.Create(ctx, varve.CreateRequest{Image: image, Name: name, Command: []string{"true"}, Pull: "never"}, nil)
		if err != nil {
			return err
		}
		return write(c, "by "+name)
	}
}

// write writes to a container's layer, as it would itself.
func write(c varve.Container, text string) error {
	spec, err := runtime.Load(c.Dir)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(spec.Rootfs.Upper, "written"), []byte(text), 0o600)
}

func remove(name string) op {
	return func(ctx context.Context, e *daemon.Engine) error {
		_, err := e.Remove(ctx, varve.RemoveRequest{Name: name, Force: true})
		return err
	}
}

// push gives an image to the registry under a name of its own.
func (p place) push(name string) op {
	return func(ctx context.Context, e *daemon.Engine) error {
		pushed := p.ref("pushed:1")
		if err := tag(name, pushed)(ctx, e); err != nil {
			return err
		}
		_, err := e.Push(ctx, varve.PushRequest{Reference: pushed, Registry: varve.Registry{PlainHTTP: true}}, nil)
		return err
	}
}

// saveAndLoad takes images out as an archive and back in.
func saveAndLoad(names ...string) op {
	return func(ctx context.Context, e *daemon.Engine) error {
		var archive bytes.Buffer
		if err := e.Save(ctx, varve.SaveRequest{Names: names}, &archive); err != nil {
			return err
		}
		for _, name := range names {
			if err := remove(name)(ctx, e); err != nil {
				return err
			}
		}
		_, err := e.Load(ctx, &archive, nil)
		return err
	}
}

func commit(container, name string) op {
	return func(ctx context.Context, e *daemon.Engine) error {
		_, err := e.Commit(ctx, varve.CommitRequest{Container: container, Name: name})
		return err
	}
}

// cutOff begins to pull an image, gives up when a part of its first layer has
// come, and so leaves an unfinished blob.
func (p place) cutOff(t *testing.T, dir, name string, image testkit.Image) op {
	m, _ := testkit.ReadImage(t, image)
	proxy := testkit.NewProxy(t, p.registry.Addr, func(r *http.Request, _ int) testkit.Fault {
		return testkit.Fault{Silent: strings.HasSuffix(r.URL.Path, m.Layers[0].Digest.String()), SilentAt: 100}
	})
	return func(ctx context.Context, e *daemon.Engine) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		go func() {
			for !hasData(filepath.Join(dir, layout.IngestDir), m.Layers[0].Digest.String()) && ctx.Err() == nil {
				time.Sleep(time.Millisecond)
			}
			cancel()
		}()
		_, err := e.Pull(ctx, varve.PullRequest{Reference: proxy.Addr + "/" + name, Registry: varve.Registry{PlainHTTP: true}}, nil)
		if !errors.Is(err, context.Canceled) {
			return fmt.Errorf("a pull that was given up: %w", err)
		}
		return nil
	}
}

// hasData tells whether the ingest of a blob has begun to fill.
func hasData(dir, blob string) bool {
	files, err := filepath.Glob(filepath.Join(dir, "*", layout.IngestData))
	return err == nil && slices.ContainsFunc(files, func(name string) bool {
		fi, err := os.Stat(name)
		info, ierr := os.ReadFile(filepath.Join(filepath.Dir(name), layout.IngestInfo))
		return err == nil && ierr == nil && fi.Size() > 0 && strings.Contains(string(info), blob)
	})
}

// logSynced waits until the change log is durable, which takes a second, so that
// the next commit leaves to it alone what came before.
func logSynced(context.Context, *daemon.Engine) error {
	time.Sleep(2 * time.Second)
	return nil
}

// newStore makes the store that is damaged: images that share layers, from a
// registry and built here, with a cache, a container, and what is unfinished.
func (p place) newStore(t *testing.T) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "store")
	p.work(t, dir,
		p.pull(awkwardName), p.pull(stackedName), tag(p.ref(stackedName), "kept:1"), p.pull(smallName),
		p.build("built:1", 1), p.build("built:2", 2), create("built:1", "worker"), commit("worker", "made:1"),
		create(p.ref(smallName), "other"), p.pull(indexName), p.cutOff(t, dir, restName, rest(t)),
		logSynced, tag("made:1", "made:again"),
	)
	return dir
}

// work opens a store, has it do all of that in order, and closes it.
func (p place) work(t *testing.T, dir string, ops ...op) {
	t.Helper()
	e, err := daemon.Open(t.Context(), daemon.Options{Root: dir, State: p.state})
	must(t, err)
	for i, do := range ops {
		if err := do(t.Context(), e); err != nil {
			t.Fatal(i, errors.Join(err, e.Close(t.Context())))
		}
	}
	must(t, e.Close(t.Context()))
}

// copyStore makes a copy with every attribute.
func copyStore(from, to string) error {
	out, err := exec.Command("cp", "-a", "--reflink=auto", from, to).CombinedOutput()
	if err != nil {
		return fmt.Errorf("copy %s: %w: %s", from, err, out)
	}
	return nil
}
