package powercut

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
	"testing"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/fsck"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// The images of the workload, as they are named in the store.
const (
	stackedName = "stacked:1"
	keptName    = "kept:1"
	smallName   = "small:1"
	builtName   = "built:1"
)

// worked is a store at work on a recorded disk.
type worked struct {
	*daemon.Engine
	dir    string
	remote string // address of the registry
	mark   func(string, ...any)
	hashed map[string]bool
}

// workOnStore is the workload: it makes a store, and pulls, tags, builds and
// removes images in it. Its database is open from the beginning, so that no
// later opening of it helps a name to become durable.
func workOnStore(dir string, args []string, mark func(string, ...any)) error {
	ctx := context.Background()
	w := &worked{dir: dir, remote: args[1], mark: mark, hashed: map[string]bool{}}
	var err error
	if w.Engine, err = daemon.Open(ctx, daemon.Options{Root: dir, State: args[0]}); err != nil {
		return err
	}
	steps := []func(context.Context) error{
		func(ctx context.Context) error { return w.pull(ctx, stackedName) },
		func(ctx context.Context) error {
			return w.change("+"+keptName, func() error {
				return w.Tag(ctx, varve.TagRequest{Source: w.remote + "/" + stackedName, Target: keptName})
			})
		},
		func(ctx context.Context) error { return w.pull(ctx, smallName) },
		w.build,
		func(ctx context.Context) error { return w.remove(ctx, w.remote+"/"+stackedName) },
		func(ctx context.Context) error { return w.remove(ctx, keptName) },
		func(ctx context.Context) error { return w.remove(ctx, builtName) },
		func(ctx context.Context) error { return w.pull(ctx, stackedName) },
	}
	for _, step := range steps {
		if err := errors.Join(step(ctx), w.hashLayers()); err != nil {
			return errors.Join(err, w.Close(ctx))
		}
	}
	return w.Close(ctx)
}

// change carries do out between two marks: what it changes is in doubt from
// the first to the second.
func (w *worked) change(what string, do func() error) error {
	w.mark("will %s", what)
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	w.mark("did %s", what)
	return nil
}

func (w *worked) pull(ctx context.Context, name string) error {
	return w.change("+"+w.remote+"/"+name, func() error {
		_, err := w.Pull(ctx, varve.PullRequest{Reference: w.remote + "/" + name, Registry: varve.Registry{PlainHTTP: true}}, nil)
		return err
	})
}

func (w *worked) remove(ctx context.Context, name string) error {
	return w.change("-"+name, func() error {
		_, err := w.Remove(ctx, varve.RemoveRequest{Name: name})
		return err
	})
}

// build builds an image in two stages on the small one.
func (w *worked) build(ctx context.Context) error {
	files, err := os.MkdirTemp("", "context-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(files)
	for i := range 20 {
		if err := os.WriteFile(filepath.Join(files, fmt.Sprintf("file-%d", i)), plainContents(i), 0o644); err != nil {
			return err
		}
	}
	dockerfile := "FROM " + w.remote + "/" + smallName + " AS files\nCOPY file-1* /some/\nFROM " + w.remote + "/" + smallName +
		"\nCOPY --from=files /some /some\nCOPY file-2 /etc/\nLABEL built=here\n"
	return w.change("+"+builtName, func() error {
		_, err := w.Build(ctx, varve.BuildRequest{
			DockerfileBytes: []byte(dockerfile), Tags: []string{builtName},
			Registry: varve.Registry{PlainHTTPHosts: []string{w.remote}},
		}, varve.BuildContext{Dir: files}, nil)
		return err
	})
}

// hashLayers tells what every new layer has in it.
func (w *worked) hashLayers() error {
	return eachLayer(w.dir, func(id, hash string) {
		if !w.hashed[id] {
			w.hashed[id] = true
			w.mark(fact+"layer %s %s", id, hash)
		}
	})
}

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

// recoverStore opens what a power cut left, twice, and tells what is there and
// what the witness finds. With a third argument it also pulls again.
func recoverStore(dir string, args []string, mark func(string, ...any)) error {
	ctx := context.Background()
	again := len(args) > 2
	for round := range 2 {
		e, err := daemon.Open(ctx, daemon.Options{Root: dir, State: args[0]})
		if err != nil {
			return fmt.Errorf("open, round %d: %w", round+1, err)
		}
		images, err := e.List(ctx)
		if err != nil {
			return errors.Join(err, e.Close(ctx))
		}
		for _, img := range images {
			if _, err := e.Inspect(ctx, img.Name); err != nil {
				return errors.Join(err, e.Close(ctx))
			}
			mark("image %d %s", round, img.Name)
		}
		if again && round == 1 {
			w := &worked{Engine: e, dir: dir, remote: args[1], mark: mark}
			if err := errors.Join(w.pull(ctx, stackedName), w.build(ctx)); err != nil {
				return errors.Join(err, e.Close(ctx))
			}
		}
		if err := e.Close(ctx); err != nil {
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
	return eachLayer(dir, func(id, hash string) { mark("layer %s %s", id, hash) })
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

// compare returns what is wrong with an aftermath. layers are those of the
// whole recording: a layer never changes.
func (l ledger) compare(marks []string, layers map[string]string) (wrong []string) {
	for round := range 2 {
		there := map[string]bool{}
		for _, m := range marks {
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
	for _, m := range marks {
		switch f := strings.Fields(m); f[0] {
		case "finding":
			wrong = append(wrong, m)
		case "layer":
			if known, ok := layers[f[1]]; ok && known != f[2] {
				wrong = append(wrong, "layer "+f[1]+" is not what it was")
			}
		}
	}
	slices.Sort(wrong)
	return wrong
}

// caseCount and seed are what the make target asks for.
func caseCount(t *testing.T, otherwise int) int { return int(number(t, "CASES", uint64(otherwise))) }
func seed(t *testing.T) uint64                  { return number(t, "SEED", 1) }

func number(t *testing.T, variable string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 63)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n
}

// kinds are the file systems that FS asks for; all of them by default.
func kinds(t *testing.T) []FileSystem {
	t.Helper()
	name := os.Getenv("FS")
	if name == "" {
		return FileSystems()
	}
	kind, err := ParseFileSystem(name)
	if err != nil {
		t.Fatal(err)
	}
	return []FileSystem{kind}
}

// againEvery is how often a recovered store is used again.
const againEvery = 8

// TestPowerCut cuts the power while a store pulls, tags, builds and removes
// images. Whatever is on the disk afterwards, the store opens, has all that
// was acknowledged with every file as it was, and nothing that the witness
// finds fault with.
func TestPowerCut(t *testing.T) {
	testkit.NeedRoot(t)
	remote := served(t)
	for _, kind := range kinds(t) {
		t.Run(string(kind), func(t *testing.T) {
			c := campaign{rig: newRig(t), kind: kind, remote: remote, state: t.TempDir()}
			bad := 0
			c.run(t, worker{role: "store"}, caseCount(t, 8), func(wrong string) bool {
				t.Error(wrong)
				bad++
				return bad < 20
			})
		})
	}
}

// TestPlantedBugIsSeen leaves out, by a system call filter, one of the calls
// that the order of writes stands on. The campaign has to notice each.
func TestPlantedBugIsSeen(t *testing.T) {
	testkit.NeedRoot(t)
	remote := served(t)
	bugs := map[FileSystem][]string{
		Ext4:  {"fsync", "sync_file_range"},
		XFS:   {"fsync", "sync_file_range"},
		Btrfs: {"fsync", "syncfs"},
	}
	for _, kind := range kinds(t) {
		for _, call := range bugs[kind] {
			t.Run(string(kind)+" without "+call, func(t *testing.T) {
				c := campaign{rig: newRig(t), kind: kind, remote: remote, state: t.TempDir()}
				seen := false
				c.run(t, worker{role: "store", skip: call}, 60, func(wrong string) bool {
					t.Logf("seen: %.600s", wrong)
					seen = true
					return false
				})
				if !seen {
					t.Error("no cut shows that the call is left out")
				}
			})
		}
	}
}

// served returns the address of a registry with the workload's images.
func served(t *testing.T) string {
	registry := testkit.Registry(t)
	registry.Push(t, testkit.Stacked(t, 20, 150), stackedName)
	registry.Push(t, testkit.Busybox(t), smallName)
	return registry.Addr
}

// campaign is one recording and its cuts.
type campaign struct {
	rig    *Rig
	kind   FileSystem
	remote string
	state  string
}

// run records w, and looks at the aftermath of n cuts until fault, which is
// told of each that is not as it has to be, returns false.
func (c campaign) run(t *testing.T, w worker, n int, fault func(string) bool) {
	rec, facts := record(t, c.rig, c.kind, w, c.state, c.remote)
	layers := map[string]string{}
	for _, line := range facts {
		if f := strings.Fields(line); f[0] == "layer" {
			layers[f[1]] = f[2]
		}
	}
	count := rec.Count(0, rec.Len())
	images := rec.Replay()
	tried, bad := 0, 0
	for i, cut := range rec.Choose(n, seed(t)) {
		args := []string{c.state, c.remote}
		if i%againEvery == againEvery-1 {
			args = append(args, "again")
		}
		tried++
		marks := rec.Marks(cut.At)
		wrong := c.aftermath(t, images.Image(cut), args, ledgerOf(marks), layers)
		if len(wrong) == 0 {
			continue
		}
		bad++
		if !fault(fmt.Sprintf("%s, after %q:\n  %s", cut, marks[max(0, len(marks)-1):], strings.Join(wrong, "\n  "))) {
			break
		}
	}
	t.Logf("%d writes of %d MiB, %d flushes, %d marks, %d layers; %d cuts, %d of them bad",
		count.Writes, count.Bytes>>20, count.Flushes, count.Marks, len(layers), tried, bad)
}

// aftermath starts the machine again, so to speak.
func (c campaign) aftermath(t *testing.T, disk *Disk, args []string, known ledger, layers map[string]string) []string {
	m, err := c.rig.Mount(c.kind, disk)
	if err != nil {
		return []string{err.Error()}
	}
	var marks []string
	w := worker{role: "recover", mark: func(m string) { marks = append(marks, m) }}
	err = w.run(t, m.Dir, args...)
	wrong := known.compare(marks, layers)
	if err != nil {
		wrong = append(wrong, err.Error())
	}
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	return wrong
}
