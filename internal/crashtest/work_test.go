package crashtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sync/errgroup"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/durable"
	"varve.dev/internal/powercut"
	"varve.dev/internal/testbuild"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/runtime"
)

var roles = map[string]powercut.Role{
	"careless":        careless,
	"careful":         careful,
	"work":            workOnStore,
	"pull":            pullTimed,
	"long pull":       pullLong,
	"pull rest":       pullRest,
	"pull and remove": pullAndRemove,
	"build twice":     buildTwice,
	"build long":      buildLong,
	"recover":         recoverStore,
	"pull and die":    pullAndDie,
	"count recovery":  countRecovery,
}

func TestMain(m *testing.M) {
	code := powercut.Main(m, roles)
	testkit.RemoveBinaries()
	os.Exit(code)
}

// The images of the workload, as they are named in the registry and in the
// store.
const (
	stackedName = "stacked:1"
	keptName    = "kept:1"
	smallName   = "small:1"
	builtName   = "built:1"
	againName   = "built:again"
	besideName  = "built:beside"
	madeName    = "made:1"
	bigName     = "big:1"
)

// workerName is the workload's container.
const workerName = "worker"

// place is where a workload works.
type place struct {
	remote   string // address of the registry
	registry *testkit.RegistryServer
	state    string
	shim     string
}

// newPlace serves the workload's images, with a stacked one of that size.
func newPlace(t *testing.T, layers, filesEach int) place {
	t.Helper()
	testkit.NeedRoot(t)
	registry := testkit.Registry(t)
	registry.Push(t, testkit.Stacked(t, layers, filesEach), stackedName)
	registry.Push(t, testkit.Busybox(t), smallName)
	return place{remote: registry.Addr, registry: registry, state: t.TempDir(), shim: filepath.Join(testkit.Binaries(t), "varve-runtime")}
}

// worker returns a worker for this place, and the arguments of its role.
func (p place) worker(role string) powercut.Worker {
	return powercut.Worker{Role: role, Env: []string{"VARVE_RUNTIME=" + p.shim}}
}

// fact begins a line of a worker that is true whenever the power is cut; the
// others are marks in time.
const fact = "fact "

// Where a workload is to kill itself.
const (
	killPoint = "VARVE_CRASH_POINT"
	killCount = "VARVE_CRASH_COUNT"
)

// work is a store at work.
type work struct {
	*daemon.Engine
	db      *metadata.DB
	dir     string
	remote  string
	state   string
	mark    func(string, ...any)
	hashed  map[string]bool
	archive []byte // for who loads one
}

// workOnStore is the workload as a worker's role. args are those of place:
// state directory and registry.
func workOnStore(dir string, args []string, mark func(string, ...any)) error {
	tellPoints := watchPoints(mark)
	if err := doWork(dir, daemon.Options{State: args[0]}, args[1], mark); err != nil {
		return err
	}
	tellPoints()
	return nil
}

// doWork makes a store in dir, and pulls, tags, builds and removes images in
// it. Its database is open from the beginning, so that no later opening of it
// helps a name to become durable.
func doWork(dir string, options daemon.Options, remote string, mark func(string, ...any)) error {
	ctx := context.Background()
	w := &work{dir: dir, remote: remote, state: options.State, mark: mark, hashed: map[string]bool{}}
	options.Root = dir
	told := options.Opened
	options.Opened = func(root *durable.Root, db *metadata.DB) {
		w.db = db
		if told != nil {
			told(root, db)
		}
	}
	var err error
	if w.Engine, err = daemon.Open(ctx, options); err != nil {
		return err
	}
	mark("opened")
	stacked := w.remote + "/" + stackedName
	steps := []step{
		w.pull(stackedName), w.tag(stacked, keptName), w.pull(smallName),
		w.build(builtName, 2), w.build(againName, 2), // the second one from the cache
		w.container, w.check,
		together(w.build(builtName, 3), w.build(besideName, 4), w.commit, w.remove(againName)),
		w.push, w.saveAndLoad,
		w.removeContainer, w.remove(stacked), w.remove(keptName),
		together(w.remove(builtName), w.remove(besideName), w.remove(madeName), w.pull(stackedName)),
	}
	for _, step := range steps {
		if err := errors.Join(step(ctx), w.hashLayers()); err != nil {
			return errors.Join(err, w.Close(ctx))
		}
	}
	return w.Close(ctx)
}

// step is a part of a workload.
type step = func(context.Context) error

// together takes steps at once.
func together(steps ...step) step {
	return func(ctx context.Context) error {
		g, ctx := errgroup.WithContext(ctx)
		for _, s := range steps {
			g.Go(func() error { return s(ctx) })
		}
		return g.Wait()
	}
}

// watchPoints counts the fault points that are passed, and kills the process
// at the one that the environment names. What it returns tells the counts.
func watchPoints(mark func(string, ...any)) (tell func()) {
	point, left := os.Getenv(killPoint), 0
	if point != "" {
		left, _ = strconv.Atoi(os.Getenv(killCount))
	}
	var counts counter
	durable.OnPoint(func(p string) {
		if n := counts.add(p); p == point && n == left {
			mark("killed at %s", p)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // until the signal is delivered
		}
	})
	return func() {
		counts.each(func(p string, n int) { mark(fact+"point %s %d", p, n) })
	}
}

// change carries do out between two marks: what it changes is in doubt from
// the first to the second.
func (w *work) change(what string, do func() error) error {
	w.mark("will %s", what)
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	w.mark("did %s", what)
	return nil
}

func (w *work) pull(name string) step {
	return func(ctx context.Context) error {
		return w.change("+"+w.remote+"/"+name, func() error {
			pulled, err := w.Pull(ctx, varve.PullRequest{Reference: w.remote + "/" + name, Registry: varve.Registry{PlainHTTP: true}}, nil)
			if name == stackedName && err == nil {
				w.mark(fact+"size %d", pulled.Size)
			}
			return err
		})
	}
}

func (w *work) tag(source, target string) step {
	return func(ctx context.Context) error {
		return w.change("+"+target, func() error {
			return w.Tag(ctx, varve.TagRequest{Source: source, Target: target})
		})
	}
}

func (w *work) remove(name string) step {
	return func(ctx context.Context) error {
		return w.change("-"+name, func() error {
			_, err := w.Remove(ctx, varve.RemoveRequest{Name: name})
			return err
		})
	}
}

// build builds an image in two stages on the small one. Builds with the same
// number have the same steps.
func (w *work) build(name string, number int) step {
	return func(ctx context.Context) error {
		// Beside the state directory: it goes with the test, killed or not.
		files, err := os.MkdirTemp(filepath.Dir(w.state), "context-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(files)
		for i := range 20 {
			if err := os.WriteFile(filepath.Join(files, fmt.Sprintf("file-%d", i)), plainContents(i), 0o644); err != nil {
				return err
			}
		}
		from := "FROM " + w.remote + "/" + smallName
		dockerfile := from + " AS files\nCOPY file-1* /some/\nRUN rm /some/file-10 && mkdir /ran && echo here >/ran/it\n" +
			from + fmt.Sprintf("\nCOPY --from=files /some /some\nCOPY file-%d /etc/file\nRUN --mount=type=cache,from=files,source=/some,target=/cache ln /etc/file /etc/same\nLABEL built=here\n", number)
		return w.change("+"+name, func() error {
			_, err := testbuild.Run(ctx, w, testbuild.Build{
				Name: name, Dockerfile: dockerfile, Dir: files, Registry: varve.Registry{PlainHTTPHosts: []string{w.remote}},
			})
			return err
		})
	}
}

// container makes a container and writes to its layer, as it would itself.
func (w *work) container(ctx context.Context) error {
	return w.change("+"+containerPrefix+workerName, func() error {
		c, err := w.Create(ctx, varve.CreateRequest{Image: builtName, Name: workerName, Command: []string{"true"}}, nil)
		if err != nil {
			return err
		}
		spec, err := runtime.Load(c.Dir)
		if err != nil {
			return err
		}
		for i := range 20 {
			if err := os.WriteFile(filepath.Join(spec.Rootfs.Upper, fmt.Sprintf("written-%d", i)), plainContents(i), 0o600); err != nil {
				return err
			}
		}
		return nil
	})
}

// commit makes an image of the container.
func (w *work) commit(ctx context.Context) error {
	return w.change("+"+madeName, func() error {
		_, err := w.Commit(ctx, varve.CommitRequest{Container: workerName, Name: madeName})
		return err
	})
}

func (w *work) removeContainer(ctx context.Context) error {
	return w.change("-"+containerPrefix+workerName, func() error {
		var ids []layout.ContainerID
		err := w.db.View(ctx, func(tx *metadata.Tx) error {
			return tx.Containers().Each("", func(id layout.ContainerID, _ layout.ContainerRecord) error {
				ids = append(ids, id)
				return nil
			})
		})
		for _, id := range ids {
			err = errors.Join(err, w.RemoveContainer(ctx, string(id)))
		}
		return err
	})
}

// check looks at everything while the store is in use.
func (w *work) check(ctx context.Context) error {
	report, err := w.Fsck(ctx, varve.FsckRequest{Level: string(layout.Deep)}, nil)
	if err == nil && report.ExitCode != 0 {
		err = errors.New(report.Text)
	}
	return err
}

// push gives what was built to the registry.
func (w *work) push(ctx context.Context) error {
	pushed := w.remote + "/pushed:1"
	if err := w.tag(builtName, pushed)(ctx); err != nil {
		return err
	}
	_, err := w.Push(ctx, varve.PushRequest{Reference: pushed, Registry: varve.Registry{PlainHTTP: true}}, nil)
	return errors.Join(err, w.remove(pushed)(ctx))
}

// saveAndLoad takes an image out as an archive and back in.
func (w *work) saveAndLoad(ctx context.Context) error {
	var archive bytes.Buffer
	if err := w.Save(ctx, varve.SaveRequest{Names: []string{keptName}}, &archive); err != nil {
		return err
	}
	if err := w.remove(keptName)(ctx); err != nil {
		return err
	}
	return w.change("+"+keptName, func() error {
		_, err := w.Load(ctx, &archive, nil)
		return err
	})
}

// hashLayers tells what every new layer has in it.
func (w *work) hashLayers() error {
	return eachLayer(w.dir, func(id, hash string) {
		if !w.hashed[id] {
			w.hashed[id] = true
			w.mark(fact+"layer %s %s", id, hash)
		}
	})
}
