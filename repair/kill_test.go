package repair_test

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/durable"
	"varve.dev/fsck"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// The child's orders, from the environment.
const (
	killRoot  = "VARVE_TEST_KILL_ROOT"
	killState = "VARVE_TEST_KILL_STATE"
	killPoint = "VARVE_TEST_KILL_POINT"
	killCount = "VARVE_TEST_KILL_COUNT"
)

func TestMain(m *testing.M) {
	if root := os.Getenv(killRoot); root != "" {
		os.Exit(child(root))
	}
	code := m.Run()
	testkit.RemoveBinaries()
	os.Exit(code)
}

// child is the process that gets killed: it repairs a store.
func child(root string) int {
	left, err := strconv.Atoi(os.Getenv(killCount))
	if err != nil {
		return 2
	}
	durable.OnPoint(func(p string) {
		if p == os.Getenv(killPoint) {
			if left--; left == 0 {
				fmt.Println("killed at", p)
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {} // until the signal is delivered
			}
		}
	})
	err = func() error {
		ctx := context.Background()
		e, err := daemon.Open(ctx, daemon.Options{Root: root, State: os.Getenv(killState)})
		if err != nil {
			return err
		}
		if _, err := e.Fsck(ctx, varve.FsckRequest{Level: string(layout.Deep), Repair: true}, nil); err != nil {
			return err
		}
		return e.Close(ctx)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// killedDamages are those of damages that a killed repair is tried on, and
// whether there is something bad to keep.
var killedDamages = map[string]bool{"bit flipped": true, "truncated": true, "deleted": false, "is a dir": false, "link broken": true, "dir gone": false, "extra file": true}

// TestKilledRepair kills a repair in each of the states that the table has for
// it, at each occurrence, and looks at what is left: nothing good is lost, what
// was bad is where it was or in quarantine, and the next repair ends with the
// tree that there was.
func TestKilledRepair(t *testing.T) {
	h := newHost(t)
	rows, kills := 0, 0
	for _, tr := range layout.Transitions() {
		if tr.Operation != "repair" {
			continue
		}
		rows++
		for _, kind := range slices.Sorted(maps.Keys(killedDamages)) {
			for count := 1; h.killedAt(t, tr, kind, count); count++ {
				kills++
				if t.Failed() {
					return // the store is not what the others count on
				}
			}
		}
	}
	t.Logf("killed %d times", kills)
	if rows == 0 || kills < rows*len(killedDamages) {
		t.Errorf("%d rows of the table are of repairs, killed %d times", rows, kills)
	}
}

// killedAt kills a repair at an occurrence of a row's fault point, and tells
// whether it came.
func (h *host) killedAt(t *testing.T, tr layout.Transition, kind string, count int) (fired bool) {
	t.Helper()
	what := fmt.Sprintf("%s, %s, occurrence %d", tr.ID, kind, count)
	dir := filepath.Dir(h.find(t, victimFile))
	good := contentsBelow(t, h.root)
	must(t, damages[kind](func(name string) string { return filepath.Join(dir, name) }))
	found := h.found(t)
	bad := contentsBelow(t, h.root)

	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), killRoot+"="+h.root, killState+"="+h.state, killPoint+"="+tr.Point, killCount+"="+strconv.Itoa(count))
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	fired = strings.Contains(string(out), "killed at")
	switch {
	case !fired && err != nil:
		t.Fatalf("%s: the child failed: %v: %s", what, err, complaints.String())
	case !fired && count == 1:
		t.Errorf("%s: the fault point %s never fired", what, tr.Point)
	}
	left := contentsBelow(t, h.root)
	for sum, name := range bad {
		if left[sum] == "" {
			t.Errorf("%s: what %s held is gone", what, name)
		}
	}
	now := h.found(t)
	switch {
	case !fired:
		if len(now) > 0 {
			t.Errorf("%s: after a repair that nobody killed: %q", what, now)
		}
	case tr.Point == layout.PointRepairMade:
		// The good files have no names in the layer yet.
		for sum, name := range good {
			if left[sum] == "" {
				t.Errorf("%s: there is no good %s", what, name)
			}
		}
		// What is too much has been taken out already.
		if kind != "extra file" && count == 1 && !slices.Equal(now, found) {
			t.Errorf("%s: the check says %q, and said %q before", what, now, found)
		}
	case tr.Point == layout.PointRepairGiven:
		found = nil
	}
	for _, f := range now {
		if isTime := strings.HasPrefix(f, "L4 ") && strings.Contains(f, ": time "); !isTime && !slices.Contains(found, f) {
			t.Errorf("%s: the check says %q", what, f)
		}
	}
	h.whole(t, h.repair(t))
	left = contentsBelow(t, h.root)
	for sum, name := range bad {
		if killedDamages[kind] && left[sum] == "" {
			t.Errorf("%s: what %s held is gone after the next repair", what, name)
		}
	}
	return fired
}

// found is what a deep check of the closed store says.
func (h *host) found(t *testing.T) (lines []string) {
	t.Helper()
	report, err := fsck.Run(t.Context(), fsck.Options{Root: h.root, Level: layout.Deep})
	must(t, err)
	for _, f := range report.Findings {
		lines = append(lines, fmt.Sprintf("%s %s %s: %s", f.Invariant, f.Object, f.Path, f.Detail))
	}
	return lines
}

// contentsBelow returns a name for each content that files of a store's layers
// and of its quarantine have, by its sum.
func contentsBelow(t *testing.T, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, dir := range []string{layout.LayersDir, layout.QuarantineDir} {
		must(t, filepath.WalkDir(filepath.Join(root, dir), func(name string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() || d.Name() == layout.QuarantineNote {
				return err
			}
			data, err := os.ReadFile(name)
			out[layout.Algorithm.FromBytes(data).Encoded()] = name
			return err
		}))
	}
	return out
}
