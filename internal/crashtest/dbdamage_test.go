package crashtest

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
)

// slowestStart is how long a store with a damaged database may take to open.
const slowestStart = 10 * time.Second

// pageDamage are the ways in which a page of the database is made bad.
var pageDamage = map[string]func(r *rand.Rand, file []byte, page int) []byte{
	"flip":     func(r *rand.Rand, f []byte, p int) []byte { f[p*4096+r.IntN(4096)] ^= 1 << r.IntN(8); return f },
	"zero":     func(_ *rand.Rand, f []byte, p int) []byte { clear(f[p*4096 : (p+1)*4096]); return f },
	"truncate": func(r *rand.Rand, f []byte, p int) []byte { return f[:p*4096+r.IntN(4096)] },
}

// TestDamagedDatabase makes every page of a store's database bad, in turn, and
// takes it away whole. The store opens, with every image, layer and container
// that it had.
func TestDamagedDatabase(t *testing.T) {
	d := newDamaged(t)
	pages := len(d.db) / 4096
	every := max(1, pages*len(pageDamage)/int(number(t, "CASES", 60)))
	cases, rebuilt, slowest := 0, 0, time.Duration(0)
	for i := 0; i < pages*len(pageDamage); i += every {
		kind := slices.Sorted(maps.Keys(pageDamage))[i%len(pageDamage)]
		page := i / len(pageDamage)
		bad := pageDamage[kind](rand.New(rand.NewPCG(seed(t), uint64(i))), slices.Clone(d.db), page)
		took, again := d.open(t, fmt.Sprintf("%s page %d", kind, page), bad, d.log)
		cases, slowest = cases+1, max(slowest, took)
		if again {
			rebuilt++
		}
	}
	if _, again := d.open(t, "no database", nil, d.log); !again {
		t.Error("a missing database was not rebuilt")
	}
	t.Logf("%d pages; %d cases, %d of them rebuilt, the slowest opening took %v", pages, cases, rebuilt, slowest)
	if rebuilt == 0 {
		t.Error("no damage was noticed")
	}
}

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
	if data, err := os.ReadFile(d.written); err != nil || string(data) != "by a container" {
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

// damaged is a store whose database is made bad again and again.
type damaged struct {
	place
	dir     string
	db, log []byte
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
	}
	if _, err := e.Create(ctx, varve.CreateRequest{Image: builtName, Name: "stopped", Command: []string{"true"}}, nil); err != nil {
		t.Fatal(err)
	}
	trees, err := filepath.Glob(filepath.Join(d.dir, layout.ActiveDir, "*", layout.TreeDir))
	if err != nil || len(trees) != 1 {
		t.Fatalf("writable layers %v, %v", trees, err)
	}
	d.written = filepath.Join(trees[0], "written")
	if err := os.WriteFile(d.written, []byte("by a container"), 0o644); err != nil {
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

func (d *damaged) list(t *testing.T, e *daemon.Engine, seen func(digest string)) (names []string) {
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

// open opens the store with that database and compares everything.
func (d *damaged) open(t *testing.T, what string, db, log []byte) (took time.Duration, rebuilt bool) {
	t.Helper()
	d.restore(t, db, log)
	ctx := context.Background()
	began := time.Now()
	e, err := daemon.Open(ctx, daemon.Options{Root: d.dir, State: d.state})
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return 0, false
	}
	if took = time.Since(began); took > slowestStart {
		t.Errorf("%s: it took %v to open", what, took)
	}
	told := e.Rebuilt()
	for _, line := range told {
		if strings.HasPrefix(line, "lost") {
			t.Errorf("%s: %s", what, line)
		}
	}
	if images := d.list(t, e, func(string) {}); !slices.Equal(images, d.images) {
		t.Errorf("%s: images %q, there were %q", what, images, d.images)
	}
	if err := e.Close(ctx); err != nil {
		t.Errorf("%s: close: %v", what, err)
	}
	if err := teststore.Check(d.dir); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	layers := map[string]string{}
	if err := eachLayer(d.dir, func(id, hash string) { layers[id] = hash }); err != nil {
		t.Error(err)
	}
	for id, hash := range d.layers {
		if layers[id] != hash {
			t.Errorf("%s: layer %s is not what it was", what, id)
		}
	}
	return took, len(told) > 0
}
