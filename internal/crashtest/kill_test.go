package crashtest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"varve.dev/internal/powercut"
	"varve.dev/layout"
)

// minimumKills is lowered by nobody without saying why. A few more are usual:
// how many removals share a round of the sweeper depends on the moment, and
// with it whether a later occurrence of its points comes.
const minimumKills = 50

// elsewhere are operations that the workload has no cause for; packages repair,
// metadata and journal kill their own at each point of theirs, and fail if one never
// fires.
var elsewhere = []string{"repair", "compact", "fence", "cache mount removal"}

// TestKillAtEveryPoint kills a store at work at each fault point: at its first
// occurrence, in the middle of its occurrences and near the end, which is to
// say in the making of the store, in a pull, in a build and in a removal.
func TestKillAtEveryPoint(t *testing.T) {
	at := newPlace(t, 6, 30)
	_, known := at.killOnce(t, "", 0) // counts only
	kills := 0
	for _, tr := range layout.Transitions() {
		if slices.Contains(elsewhere, tr.Operation) {
			continue
		}
		n := known.points[tr.Point]
		if n == 0 {
			t.Errorf("%s (%s): the fault point %s never fired", tr.ID, tr.Operation, tr.Point)
		}
		occurrences := []int{1, (n + 1) / 2, n - n/8}
		slices.Sort(occurrences)
		for _, count := range slices.Compact(occurrences) {
			if count < 1 {
				continue
			}
			if killed, _ := at.killOnce(t, tr.Point, count); killed {
				kills++
			} else if count == 1 {
				t.Errorf("%s (%s): the fault point %s did not fire again", tr.ID, tr.Operation, tr.Point)
			}
		}
	}
	t.Logf("killed at %d crash points; passed: %v", kills, known.points)
	if kills < minimumKills {
		t.Errorf("killed at %d crash points, the committed minimum is %d", kills, minimumKills)
	}
}

// TestKillAtRandom kills a store at work at moments that nobody chose. The rest
// of CASES is TestKillCommands'.
func TestKillAtRandom(t *testing.T) {
	at := newPlace(t, 6, 30)
	dir := t.TempDir()
	began := time.Now()
	w := at.worker("work")
	w.Mark = func(string) {}
	if err := w.Run(dir, at.state, at.remote); err != nil {
		t.Fatal(err)
	}
	whole := time.Since(began)
	random := rand.New(rand.NewPCG(seed(t), 0))
	killed, n := 0, caseCount(t, 50)/5
	for i := range n {
		w := at.worker("work")
		w.KillAfter = time.Duration(random.Int64N(int64(whole)))
		if done, _ := at.killed(t, w, fmt.Sprintf("case %d, killed after %v", i, w.KillAfter)); done {
			killed++
		}
	}
	t.Logf("%d runs of %v, %d of them killed", n, whole, killed)
	if killed == 0 {
		t.Error("none was killed in time")
	}
}

// killed runs the workload until it is killed, and judges what is left.
func (p place) killed(t *testing.T, w powercut.Worker, what string) (killed bool, known facts) {
	t.Helper()
	dir, err := os.MkdirTemp("", "varve-kill-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	var marks, lines []string
	w.Mark = func(line string) {
		if f, ok := strings.CutPrefix(line, fact); ok {
			lines = append(lines, f)
		} else {
			marks = append(marks, line)
		}
	}
	err = w.Run(dir, p.state, p.remote)
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != -1) {
		t.Fatalf("%s: %v", what, err)
	}
	known = factsOf(lines)
	wrong := p.judge(dir, ledgerOf(marks), known, true).wrong
	left := p.remains()
	if len(left) > 0 {
		// A step that was still dying when the store was opened keeps its
		// scratch folder until the next opening.
		wrong = append(wrong, p.judge(dir, ledger{}, facts{}, false).wrong...)
		left = p.remains()
	}
	wrong = append(wrong, left...)
	if len(wrong) > 0 {
		t.Errorf("%s, after %q:\n  %s", what, marks[max(0, len(marks)-2):], strings.Join(wrong, "\n  "))
	}
	return err != nil, known
}

// killOnce kills the workload at an occurrence of a fault point.
func (p place) killOnce(t *testing.T, point string, count int) (killed bool, known facts) {
	t.Helper()
	w := p.worker("work")
	w.Env = append(w.Env, killPoint+"="+point, killCount+"="+strconv.Itoa(count))
	return p.killed(t, w, fmt.Sprintf("%s, occurrence %d", point, count))
}

// remains returns what a killed process left on the machine, outside its
// store: shims that go on, and files that live as long as a call.
func (p place) remains() (found []string) {
	deadline := time.Now().Add(2 * time.Second)
	for {
		found = nil
		exes, _ := filepath.Glob("/proc/[0-9]*/exe")
		for _, exe := range exes {
			if target, err := os.Readlink(exe); err == nil && strings.TrimSuffix(target, " (deleted)") == p.shim {
				found = append(found, "a shim runs on: "+exe)
			}
		}
		entries, err := os.ReadDir(p.state)
		if err != nil {
			return []string{err.Error()}
		}
		for _, e := range entries {
			found = append(found, "in the state directory: "+e.Name())
		}
		if len(found) == 0 || time.Now().After(deadline) {
			return found
		}
		time.Sleep(20 * time.Millisecond)
	}
}
