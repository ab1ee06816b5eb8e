package crashtest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
)

// slowestStart is how long a store with a damaged database may take to open.
const slowestStart = 10 * time.Second

// outcomes of opening a store whose database is damaged.
const (
	rebuilt   = "noticed when opened, rebuilt, all there"
	harmless  = "not noticed, nothing is missing"
	lacking   = "missing without a word"
	lostAfter = "noticed, and lost all the same"
)

// TestDamagedDatabase makes every page of a store's database bad, in turn, and
// takes it away whole. The store opens, with every image, layer and container
// that it had.
func TestDamagedDatabase(t *testing.T) {
	d := newDamaged(t)
	var tally testkit.Tally
	slowest := time.Duration(0)
	check := func(kind, what string, db []byte) {
		d.restore(t, db, d.log)
		took, again, wrong := d.open(t)
		slowest = max(slowest, took)
		if took > slowestStart {
			t.Errorf("%s: it took %v to open", what, took)
		}
		outcome := map[bool]string{true: rebuilt, false: harmless}[again]
		if len(wrong) > 0 {
			outcome = map[bool]string{true: lostAfter, false: lacking}[again]
			t.Errorf("%s: %s:\n  %s", what, outcome, strings.Join(wrong, "\n  "))
		}
		tally.Add(kind, outcome)
	}
	for _, i := range d.cases(t, 60) {
		kind, page, bad := testkit.DamagePage(d.db, d.old, i)
		check(kind, fmt.Sprintf("%s, page %d", kind, page), bad)
	}
	check(noDatabase, noDatabase, nil)
	t.Logf("%d pages; the slowest opening took %v\n%s", len(d.db)/4096, slowest, tally.Table(
		"a page of a store's database", append(testkit.KindsOfPageDamage(), noDatabase), []string{rebuilt, harmless, lacking, lostAfter}))
	if tally.Total(rebuilt) < 2 {
		t.Error("no damage was noticed")
	}
}

// cases chooses as many damages as the environment asks for, or usual.
func (d *damaged) cases(t *testing.T, usual uint64) []int {
	all := rand.New(rand.NewPCG(seed(t), 0)).Perm(testkit.PageDamages(d.db))
	return all[:min(len(all), int(number(t, "CASES", usual)))]
}

// noDatabase is the kind of damage that is the whole file.
const noDatabase = "all of them: no file"

// TestDatabaseAndLogLost takes both away: images come back from their blobs,
// without their names, and nobody's data goes.
func TestDatabaseAndLogLost(t *testing.T) {
	d := newDamaged(t)
	d.restore(t, nil, nil)
	ctx := context.Background()
	e, err := daemon.Open(ctx, daemon.Options{Root: d.dir, State: d.state})
	if err != nil {
		t.Fatal(err)
	}
	images, err := e.List(ctx)
	if err != nil {
		t.Error(err)
	}
	for _, img := range images {
		if !strings.HasPrefix(img.Name, "<none>") {
			t.Errorf("image %q", img.Name)
		}
		if _, err := e.Inspect(ctx, img.ID); err != nil {
			t.Errorf("%s: %v", img.Name, err)
		}
	}
	if len(images) != len(d.digests) {
		t.Errorf("%d images, there were %d", len(images), len(d.digests))
	}
	told := strings.Join(e.Rebuilt(), "\n")
	for _, want := range []string{"the log", "kept: active/", "kept: containers/"} {
		if !strings.Contains(told, want) {
			t.Errorf("the report lacks %q:\n%s", want, told)
		}
	}
	if data, err := os.ReadFile(d.written); err != nil || string(data) != byContainer {
		t.Errorf("what a container had written: %q, %v", data, err)
	}
	for digest := range d.digests {
		if _, err := e.Create(ctx, varve.CreateRequest{Image: digest, Command: []string{"true"}, Pull: "never"}, nil); err != nil {
			t.Errorf("a container of %s: %v", digest, err)
		}
	}
	// A pull brings the names back, and fetches nothing but manifests.
	if _, err := e.Pull(ctx, varve.PullRequest{Reference: d.remote + "/" + stackedName, Registry: varve.Registry{PlainHTTP: true}}, nil); err != nil {
		t.Error(err)
	}
	if err := e.Close(ctx); err != nil {
		t.Error(err)
	}
	if err := teststore.Check(d.dir); err != nil {
		t.Error(err)
	}
}

// byContainer is what a container has written.
const byContainer = "by a container"

// damaged is a store whose database is made bad again and again.
type damaged struct {
	place
	dir     string
	db, log []byte
	old     [][]byte // what the database was before
	images  []string
	digests map[string]bool
	layers  map[string]string
	written string // by a container
}

func newDamaged(t *testing.T) *damaged {
	d := &damaged{place: newPlace(t, 4, 20), dir: t.TempDir(), digests: map[string]bool{}, layers: map[string]string{}}
	t.Setenv("VARVE_RUNTIME", d.shim)
	ctx := context.Background()
	e, err := daemon.Open(ctx, daemon.Options{Root: d.dir, State: d.state})
	if err != nil {
		t.Fatal(err)
	}
	w := &work{Engine: e, dir: d.dir, remote: d.remote, state: d.state, mark: func(string, ...any) {}}
	for _, step := range []func(context.Context) error{w.pull(stackedName), w.tag(w.remote+"/"+stackedName, keptName), w.pull(smallName), w.build(builtName, 2)} {
		if err := step(ctx); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(filepath.Join(d.dir, layout.DatabaseFile))
		if err != nil {
			t.Fatal(err)
		}
		d.old = append(d.old, data)
	}
	if _, err := e.Create(ctx, varve.CreateRequest{Image: builtName, Name: "stopped", Command: []string{"true"}}, nil); err != nil {
		t.Fatal(err)
	}
	trees, err := filepath.Glob(filepath.Join(d.dir, layout.ActiveDir, "*", layout.TreeDir))
	if err != nil || len(trees) != 1 {
		t.Fatalf("writable layers %v, %v", trees, err)
	}
	d.written = filepath.Join(trees[0], "written")
	if err := os.WriteFile(d.written, []byte(byContainer), 0o644); err != nil {
		t.Fatal(err)
	}
	d.images = d.list(t, e, func(digest string) { d.digests[digest] = true })
	if err := e.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if err := eachLayer(d.dir, func(id, hash string) { d.layers[id] = hash }); err != nil {
		t.Fatal(err)
	}
	for name, into := range map[string]*[]byte{layout.DatabaseFile: &d.db, layout.LogFile: &d.log} {
		if *into, err = os.ReadFile(filepath.Join(d.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func (d *damaged) list(t *testing.T, e varve.Backend, seen func(digest string)) (names []string) {
	t.Helper()
	images, err := e.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range images {
		names = append(names, i.Name+" "+i.Digest)
		seen(i.Digest)
	}
	slices.Sort(names)
	return names
}

// restore puts the database and the log there, or takes them away.
func (d *damaged) restore(t *testing.T, db, log []byte) {
	t.Helper()
	for name, data := range map[string][]byte{layout.DatabaseFile: db, layout.LogFile: log, layout.SuspectFile: nil} {
		path := filepath.Join(d.dir, name)
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		if data == nil {
			continue
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// open opens the store and tells what is not as it was.
func (d *damaged) open(t *testing.T) (took time.Duration, rebuilt bool, wrong []string) {
	t.Helper()
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	ctx := context.Background()
	began := time.Now()
	e, err := daemon.Open(ctx, daemon.Options{Root: d.dir, State: d.state})
	took = time.Since(began)
	if err != nil {
		bad("open: %v", err)
		return took, false, wrong
	}
	told := e.Rebuilt()
	for _, line := range told {
		if strings.HasPrefix(line, "lost") {
			bad("%s", line)
		}
	}
	if images := d.list(t, e, func(string) {}); !slices.Equal(images, d.images) {
		bad("images %q, there were %q", images, d.images)
	}
	if err := e.Close(ctx); err != nil {
		bad("close: %v", err)
	}
	if err := teststore.Check(d.dir); err != nil {
		bad("%v", err)
	}
	layers := map[string]string{}
	if err := eachLayer(d.dir, func(id, hash string) { layers[id] = hash }); err != nil {
		t.Error(err)
	}
	for id, hash := range d.layers {
		if layers[id] != hash {
			bad("layer %s is not what it was", id)
		}
	}
	if data, err := os.ReadFile(d.written); err != nil || string(data) != byContainer {
		bad("what a container had written: %q, %v", data, err)
	}
	return took, len(told) > 0, wrong
}
