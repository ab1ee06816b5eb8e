package crashtest

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
)

// stranger is a directory in the root that no format has had so far.
const stranger = "networks"

// A rebuilt database keeps what is somebody's data, whatever it knows of it,
// and says so, at this opening and at every later one:
//
//   - late, a container that was made after the last line of the log that is
//     left;
//   - removed, one whose removal was acknowledged, and whose directories stood
//     when the database was lost, with the sweep that named them;
//   - stopped, one whose writable layer was being made a layer: renamed, not
//     recorded;
//   - volumes, and whatever else stands in the root.
func TestNobodysDataGoes(t *testing.T) {
	d := newDamaged(t)
	ctx := context.Background()
	open := func() *daemon.Engine {
		t.Helper()
		e, err := daemon.Open(ctx, daemon.Options{Root: d.dir, State: d.state})
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	e := open()
	removed := d.container(t, e, "removed")
	must(t, os.WriteFile(filepath.Join(d.dir, removed[0], layout.TreeDir, "data"), nil, 0o644))
	aside := t.TempDir()
	for i, dir := range removed {
		must(t, os.CopyFS(filepath.Join(aside, string(rune('a'+i))), os.DirFS(filepath.Join(d.dir, dir))))
	}
	must(t, e.RemoveContainer(ctx, filepath.Base(removed[1])))
	log, err := os.ReadFile(filepath.Join(d.dir, layout.LogFile))
	must(t, err)
	late := d.container(t, e, "late")
	must(t, e.Close(ctx))

	for i, dir := range removed {
		must(t, os.CopyFS(filepath.Join(d.dir, dir), os.DirFS(filepath.Join(aside, string(rune('a'+i))))))
	}
	stopped := filepath.Dir(filepath.Dir(d.written)) // active/<id>
	must(t, os.RemoveAll(filepath.Join(stopped, layout.WorkDir)))
	must(t, os.Rename(stopped, filepath.Join(d.dir, layout.LayersDir, filepath.Base(stopped))))
	for _, file := range []string{layout.VolumesDir + "/v/_data/file", stranger + "/file"} {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(d.dir, file)), 0o755))
		must(t, os.WriteFile(filepath.Join(d.dir, file), []byte(file), 0o644))
	}
	d.restore(t, nil, append(log, "0badf00d {torn"...))

	for round := range 3 {
		e := open()
		info, err := e.Info(ctx)
		must(t, err)
		told := strings.Join(info.Recovered, "\n")
		for _, dir := range slices.Concat(late, removed, []string{layout.VolumesDir + "/v"}) {
			if !strings.Contains(told, dir) {
				t.Errorf("opening %d: nothing is said of %s:\n%s", round+1, dir, told)
			}
			if _, err := os.Stat(filepath.Join(d.dir, dir)); err != nil {
				t.Errorf("opening %d: %v", round+1, err)
			}
		}
		if strings.Contains(told, "lost: ") {
			t.Errorf("opening %d:\n%s", round+1, told)
		}
		for _, file := range []string{layout.VolumesDir + "/v/_data/file", stranger + "/file"} {
			if data, err := os.ReadFile(filepath.Join(d.dir, file)); err != nil || string(data) != file {
				t.Errorf("opening %d: %s: %q, %v", round+1, file, data, err)
			}
		}
		if data, err := os.ReadFile(d.written); err != nil || string(data) != byContainer {
			t.Errorf("opening %d: what a container had written: %q, %v", round+1, data, err)
		}
		must(t, e.Close(ctx))
	}
	must(t, os.RemoveAll(filepath.Join(d.dir, stranger))) // R1
	must(t, teststore.Check(d.dir))
}

// container makes a container and returns its directories in the store: of its
// writable layer, and its own.
func (d *damaged) container(t *testing.T, e *daemon.Engine, name string) []string {
	t.Helper()
	list := func() []string {
		names, err := filepath.Glob(filepath.Join(d.dir, layout.ActiveDir, "*"))
		must(t, err)
		return names
	}
	before := list()
	c, err := e.Create(context.Background(), varve.CreateRequest{Image: builtName, Name: name, Command: []string{"true"}}, nil)
	must(t, err)
	for _, dir := range list() {
		if !slices.Contains(before, dir) {
			return []string{filepath.Join(layout.ActiveDir, filepath.Base(dir)), filepath.Join(layout.ContainersDir, c.ID)}
		}
	}
	t.Fatalf("container %s has no writable layer", name)
	return nil
}
