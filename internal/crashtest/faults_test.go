package crashtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"varve.dev/daemon"
	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/internal/faultcall"
	"varve.dev/internal/testbuild"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// pullAndRemove is a workload for faults: pull, tag, remove.
func pullAndRemove(dir string, args []string, mark func(string, ...any)) error {
	return faultyWork(dir, args, mark, func(w *work) []step {
		stacked := w.remote + "/" + stackedName
		return []step{w.pull(stackedName), w.tag(stacked, keptName), w.remove(stacked), w.remove(keptName), w.pull(stackedName)}
	})
}

// buildTwice is one more: a build of two stages with a pull of its base, the
// same with all its steps known, and the removal of what was built.
func buildTwice(dir string, args []string, mark func(string, ...any)) error {
	return faultyWork(dir, args, mark, func(w *work) []step { return []step{w.build(builtName, 2), w.build(builtName, 2), w.remove(builtName)} })
}

// faultyWork takes the steps up to the first that fails, and that one once
// more in the same process. What comes of it are facts.
func faultyWork(dir string, args []string, mark func(string, ...any), steps func(*work) []step) error {
	ctx := context.Background()
	e, err := daemon.Open(ctx, daemon.Options{Root: dir, State: args[0]})
	if err != nil {
		mark(fact+"error %q", err)
		return nil
	}
	w := &work{Engine: e, dir: dir, remote: args[1], state: args[0], mark: mark}
	for _, step := range steps(w) {
		if err := step(ctx); err != nil {
			mark(fact+"error %q", testbuild.Told(err))
			if err := step(ctx); errors.Is(err, errdefs.ErrPoisoned) {
				mark(fact+"poisoned %q", err)
			} else if err != nil {
				mark(fact+"again %q", err)
			}
			break
		}
	}
	if err := e.Close(ctx); err != nil {
		mark(fact+"close %q", err)
	}
	report, err := fsck.Run(ctx, fsck.Options{Root: dir, Level: layout.Normal})
	for _, f := range report.Findings {
		mark(fact+"left %q", fmt.Sprint(f.Invariant, " ", f.Object, ": ", f.Detail))
	}
	return errors.Join(err, tellTrees(dir, mark))
}

// tellTrees tells what is in all layers, but for what is of the run: the times,
// and where overlayfs says that a file was copied from.
func tellTrees(dir string, mark func(string, ...any)) error {
	var all []string
	layers, err := filepath.Glob(filepath.Join(dir, layout.LayersDir, "*", layout.TreeDir))
	for _, l := range layers {
		lines, lerr := testkit.ListTree(l)
		err = errors.Join(err, lerr)
		all = append(all, ofRun.ReplaceAllString(strings.Join(lines, "\n"), ""))
	}
	slices.Sort(all)
	mark(fact+"trees %q", digest.FromString(strings.Join(all, "\n\n")))
	return err
}

var ofRun = regexp.MustCompile(` mtime [0-9.]+| "trusted\.overlay\.(origin|uuid|impure)"="(\\.|[^"\\])*"`)

// TestFaults lets each change to a store's files, and to those beside it that
// live as long as a step, fail in turn: a broken disk once, a full one for
// good. Each ends in one error that says so, and the store behind it opens and
// has all that was acknowledged.
func TestFaults(t *testing.T) {
	at := newPlace(t, 3, 5)
	at.registry.Push(t, testkit.FewApplets(t, "sh", "rm", "mkdir", "ln"), smallName)
	// A build that fails cancels its other downloads, and those are kept for
	// the next one.
	for role, givesBack := range map[string]bool{"pull and remove": true, "build twice": false} {
		t.Run(role, func(t *testing.T) {
			f := newFaulty(t, at, role, givesBack)
			f.each(t, faultcall.Plan{Error: syscall.EIO})
			f.each(t, faultcall.Plan{Error: syscall.ENOSPC, Stays: true})
		})
	}
}

// TestFailedSyncPoisons lets the first sync of each sort fail that a pull makes.
// The next operation by the same engine is refused, and says why; opened again,
// the store pulls and builds.
func TestFailedSyncPoisons(t *testing.T) {
	f := newFaulty(t, newPlace(t, 3, 5), "pull and remove", true)
	tried := 0
	for _, call := range []string{"fsync", "fdatasync", "sync_file_range", "syncfs"} {
		p := faultcall.Plan{Calls: []string{call}, Error: syscall.EIO}
		if sound := f.run(t, p); len(sound.all) > sound.opening {
			p.At = sound.opening + 1
		} else {
			continue // not on this file system
		}
		tried++
		o := f.run(t, p)
		wrong := append(f.told(o, p), f.judge(f.store, ledgerOf(o.marks), factsOf(o.lines), true).wrong...)
		if said := o.said("poisoned"); !strings.Contains(said, "poisoned by a failed sync") || !strings.Contains(said, p.Error.Error()) {
			wrong = append(wrong, fmt.Sprintf("once more, it says %q", said))
		}
		if len(wrong) > 0 {
			t.Errorf("%v fails: %q\n  %s", o.failed, o.lines, strings.Join(wrong, "\n  "))
		}
	}
	if tried < 2 {
		t.Errorf("%d sorts of sync were seen", tried)
	}
}

// faulty is a workload in a place of its own.
type faulty struct {
	place
	role, store string
	givesBack   bool // after a full disk no download is kept
}

func newFaulty(t *testing.T, at place, role string, givesBack bool) *faulty {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	at.state = filepath.Join(dir, "run", "state")
	return &faulty{place: at, role: role, store: filepath.Join(dir, "store"), givesBack: givesBack}
}

// each lets every change fail in turn, or CASES of them, SEED says which.
func (f *faulty) each(t *testing.T, p faultcall.Plan) {
	t.Helper()
	began := time.Now()
	sound := f.run(t, p)
	took := time.Since(began)
	changes := len(sound.all)
	if sound.err != nil || sound.said("error")+sound.said("close") != "" || changes == 0 {
		t.Fatalf("without a fault: %d changes, %v, %q", changes, sound.err, sound.lines)
	}
	every := max(1, changes/caseCount(t, 7))
	said := map[string]int{}
	for k := 1 + int(seed(t))%every; k <= changes; k += every {
		p.At = k
		said[f.one(t, p, sound.said("trees"))]++
	}
	t.Logf("%v at every %d. of %d changes (%v without a fault): %v", p.Error, every, changes, took.Round(time.Millisecond), said)
}

// faultRun is what a run of a workload came to.
type faultRun struct {
	all, failed []faultcall.Change
	opening     int // so many of all came before the first step
	marks       []string
	lines       []string // facts
	err         error    // of the process
}

// said is the text of a fact, "" if there is none.
func (o faultRun) said(word string) string {
	for _, l := range o.lines {
		if quoted, ok := strings.CutPrefix(l, word+" "); ok {
			text, _ := strconv.Unquote(quoted)
			return text
		}
	}
	return ""
}

// poisoned tells whether the store was, and so changed nothing any more.
func (o faultRun) poisoned() bool {
	return strings.Contains(o.said("error")+o.said("poisoned")+o.said("close"), "poisoned by a failed sync")
}

// run runs the workload on a new store, with faults as planned.
func (f *faulty) run(t *testing.T, p faultcall.Plan) (o faultRun) {
	t.Helper()
	must(t, os.RemoveAll(f.store))
	p.Below = []string{f.store, f.state}
	w := f.worker(f.role)
	w.Watch = faultcall.New(p)
	w.Patience = 30 * time.Second
	w.Mark = func(line string) {
		if l, ok := strings.CutPrefix(line, fact); ok {
			o.lines = append(o.lines, l)
			return
		}
		if len(o.marks) == 0 {
			all, _ := w.Watch.Seen()
			o.opening = len(all)
		}
		o.marks = append(o.marks, line)
	}
	o.err = w.Run(f.store, f.state, f.remote)
	o.all, o.failed = w.Watch.Seen()
	return o
}

// one runs the workload with a fault and says what came of it. trees are what
// it leaves without.
func (f *faulty) one(t *testing.T, p faultcall.Plan, trees string) string {
	t.Helper()
	o := f.run(t, p)
	wrong := append(f.told(o, p), f.remains()...)
	if _, err := os.Lstat(f.store); err == nil {
		wrong = append(wrong, f.judge(f.store, ledgerOf(o.marks), factsOf(o.lines), false).wrong...)
		if p.Stays && f.givesBack && !o.poisoned() {
			wrong = append(wrong, notGivenBack(f.store)...)
		}
	}
	if o.said("error") == "" && o.said("trees") != trees {
		wrong = append(wrong, "the layers are not what they are without a fault, and nobody says so")
	}
	if len(wrong) > 0 {
		t.Errorf("change %d (%.300v) fails with %v, after %q: %q\n  %s", p.At, o.failed, p.Error,
			o.marks[max(0, len(o.marks)-2):], o.lines, strings.Join(wrong, "\n  "))
	}
	switch {
	case o.said("poisoned") != "":
		return "an error, and no more changes"
	case o.said("error") != "":
		return "an error"
	case o.said("close") != "":
		return "an error at the end"
	}
	return "went well all the same"
}

// told returns what is wrong with what the workload was told.
func (f *faulty) told(o faultRun, p faultcall.Plan) (wrong []string) {
	if o.err != nil {
		wrong = append(wrong, fmt.Sprintf("it ended with: %v", o.err))
	}
	first, cause := o.said("error"), p.Error.Error()
	if first == "" {
		first = o.said("close") // what a command says that has nothing else to say
	}
	if first == "" {
		return wrong
	}
	if n := strings.Count(first, cause); n != 1 {
		wrong = append(wrong, fmt.Sprintf("the error says %d times what it is", n))
	}
	if !says(first, o.failed) {
		wrong = append(wrong, "the error does not say where")
	}
	if again := o.said("again"); again != "" && (!p.Stays || !strings.Contains(again, cause)) {
		wrong = append(wrong, "once more, it ends in another error")
	}
	if left := o.said("left"); left != "" && !p.Stays && !o.poisoned() && !failedRemoval(o) {
		wrong = append(wrong, "not clean when it is closed: "+left)
	}
	if flush := f.failedFlush(o); flush != "" && len(o.marks) > 0 && o.said("error") != "" && o.said("poisoned") == "" {
		wrong = append(wrong, "after "+flush+" failed the store goes on")
	}
	return wrong
}

// says tells whether the text names one of the things that failed, or the line
// of the Dockerfile.
func says(text string, failed []faultcall.Change) bool {
	return slices.ContainsFunc(failed, func(c faultcall.Change) bool {
		name := filepath.Base(c.Path)
		if name == layout.TreeDir {
			name = "layer" // the root of its tree
		}
		return strings.Contains(text, c.Path) || strings.Contains(text, name) || strings.Contains(text, "Dockerfile:")
	})
}

// failedRemoval tells whether it was a removal that failed: what stays then is
// removed when the store is opened again.
func failedRemoval(o faultRun) bool {
	return slices.ContainsFunc(o.failed, func(c faultcall.Change) bool { return c.Call == "unlinkat" })
}

// failedFlush is the flush of a file of the store that failed, if one did.
func (f *faulty) failedFlush(o faultRun) string {
	for _, c := range o.failed {
		if strings.Contains(c.Call, "sync") && strings.HasPrefix(c.Path, f.store) {
			return c.String()
		}
	}
	return ""
}

// notGivenBack lists what a full disk should have had back.
func notGivenBack(store string) (wrong []string) {
	ingests, err := os.ReadDir(filepath.Join(store, layout.IngestDir))
	for _, e := range ingests {
		wrong = append(wrong, "still there: ingest "+e.Name())
	}
	if err != nil {
		wrong = append(wrong, err.Error())
	}
	return wrong
}
