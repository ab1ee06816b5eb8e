package crashtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"varve.dev/daemon"
	"varve.dev/internal/faultfs"
	"varve.dev/internal/testkit"
)

// pullAndRemove is a workload that needs no overlay, which cannot stand on
// FUSE: pull, tag, remove.
func pullAndRemove(dir string, args []string, mark func(string, ...any)) error {
	ctx := context.Background()
	e, err := daemon.Open(ctx, daemon.Options{Root: dir, State: args[0]})
	if err != nil {
		return err
	}
	w := &work{Engine: e, dir: dir, remote: args[1], state: args[0], mark: mark, hashed: map[string]bool{}}
	stacked := w.remote + "/" + stackedName
	for _, step := range []func(context.Context) error{
		w.pull(stackedName), w.tag(stacked, keptName), w.pull(smallName), w.remove(stacked), w.remove(keptName), w.pull(stackedName),
	} {
		if err := step(ctx); err != nil {
			return errors.Join(err, e.Close(ctx))
		}
	}
	return e.Close(ctx)
}

// TestFaults lets each change that a store makes to its disk fail, in turn: a
// broken disk once, a full one for good. Each ends in an error that says so,
// and the store behind it opens and has all that was acknowledged.
func TestFaults(t *testing.T) {
	at := newPlace(t, 3, 5)
	testkit.Need(t, "fusermount3", "fuse3")
	f := newFaulty(t, at)
	changes := f.run(t, faultfs.Plan{})
	cases := caseCount(t, 40)
	every := max(1, 2*changes/cases)
	said := map[string]int{}
	n := 0
	from := int(number(t, "FROM", 0))
	for i, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
		for k := 1 + i + from; k <= changes; k += every {
			said[f.one(t, faultfs.Plan{At: k, Error: errno, Stays: errno == syscall.ENOSPC})]++
			n++
		}
	}
	t.Logf("%d changes; %d cases: %v", changes, n, said)
}

type faulty struct {
	place
	real, seen string
	fs         *faultfs.FS
}

func newFaulty(t *testing.T, at place) *faulty {
	t.Helper()
	f := &faulty{place: at, real: filepath.Join(t.TempDir(), "real"), seen: filepath.Join(t.TempDir(), "seen")}
	must(t, errors.Join(os.Mkdir(f.real, 0o755), os.Mkdir(f.seen, 0o755)))
	var err error
	f.fs, err = faultfs.Mount(f.real, f.seen)
	must(t, err)
	t.Cleanup(func() { must(t, f.fs.Close()) })
	return f
}

// run runs the workload with nothing that fails, and counts.
func (f *faulty) run(t *testing.T, p faultfs.Plan) int {
	t.Helper()
	f.fs.Begin(p)
	w := f.worker("pull and remove")
	w.Mark = func(string) {}
	must(t, w.Run(filepath.Join(f.seen, "store"), f.state, f.remote))
	n, _ := f.fs.Count()
	must(t, os.RemoveAll(filepath.Join(f.real, "store")))
	return n
}

// one runs the workload with a fault and says what came of it.
func (f *faulty) one(t *testing.T, p faultfs.Plan) string {
	t.Helper()
	f.fs.Begin(p)
	var marks, lines []string
	w := f.worker("pull and remove")
	w.Patience = 30 * time.Second
	w.Mark = func(line string) {
		if l, ok := strings.CutPrefix(line, fact); ok {
			lines = append(lines, l)
		} else {
			marks = append(marks, line)
		}
	}
	err := w.Run(filepath.Join(f.seen, "store"), f.state, f.remote)
	_, failed := f.fs.Count()
	what := fmt.Sprintf("change %d (%.80s) fails with %v", p.At, strings.Join(failed, ", "), p.Error)
	result := "went well all the same"
	if err != nil {
		result = "an error"
		if !strings.Contains(err.Error(), p.Error.Error()) {
			t.Errorf("%s: the error is %v", what, err)
		}
		if strings.Contains(err.Error(), "goroutine ") {
			t.Errorf("%s: it crashed: %v", what, err)
		}
	}
	f.fs.Begin(faultfs.Plan{})
	store := filepath.Join(f.real, "store")
	if _, serr := os.Lstat(store); serr == nil {
		// The ledger's last change is in doubt where it ended in an error.
		if wrong := f.judge(store, ledgerOf(marks), factsOf(lines), false).wrong; len(wrong) > 0 {
			t.Errorf("%s, after %q (%v):\n  %s", what, marks[max(0, len(marks)-2):], err, strings.Join(wrong, "\n  "))
		}
	}
	must(t, os.RemoveAll(store))
	return result
}
