package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"varve.dev/fsck"
	"varve.dev/internal/corrupt"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// unclean is a host whose store need not be clean at the end.
func unclean(t *testing.T) *host {
	t.Helper()
	testkit.NeedRoot(t)
	h := &host{t: t, bin: testkit.Binaries(t), root: filepath.Join(t.TempDir(), "root")}
	h.env = append(os.Environ(), "VARVE_ROOT="+h.root, "VARVE_STATE="+t.TempDir())
	return h
}

// damaged is a host with an image whose store was damaged.
func damaged(t *testing.T, kind string) *host {
	t.Helper()
	h := unclean(t)
	h.run("pull", busybox(t))
	if _, err := corrupt.Do(h.root, kind, 1); err != nil {
		t.Fatal(err)
	}
	return h
}

// What opening the store makes good is told by the check that opens it, once.
func TestFsckTellsWhatOpeningHeals(t *testing.T) {
	h := damaged(t, "record flipped")
	out, code := h.try("fsck", "--deep")
	if code != 1 || !strings.Contains(out, "M1 loss: record ") || !strings.Contains(out, "healed when the store was opened") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	if out := h.run("fsck", "--deep"); !strings.Contains(out, ": clean") {
		t.Errorf("once more:\n%s", out)
	}
	// What the database has lost for good is no less lost for that.
	if err := errors.Join(os.Remove(filepath.Join(h.root, layout.DatabaseFile)), os.Remove(filepath.Join(h.root, layout.LogFile))); err != nil {
		t.Fatal(err)
	}
	if out, code := h.try("fsck"); code != 2 || !strings.Contains(out, "lost: the log") {
		t.Errorf("without database and log: exit code %d:\n%s", code, out)
	}
}

// A store that cannot be opened is checked as it is.
func TestFsckOfAStoreThatDoesNotOpen(t *testing.T) {
	h := damaged(t, "record flipped")
	layers := filepath.Join(h.root, layout.LayersDir)
	if err := errors.Join(os.Rename(layers, h.root+".moved"), os.Symlink(h.root+".moved", layers)); err != nil {
		t.Fatal(err)
	}
	cmd := h.command("fsck", "--json")
	var said strings.Builder
	cmd.Stderr = &said
	out, _ := cmd.Output()
	var report struct{ Findings []struct{ Invariant string } }
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatal(err, said.String())
	}
	found := map[string]bool{}
	for _, f := range report.Findings {
		found[f.Invariant] = true
	}
	if code := cmd.ProcessState.ExitCode(); code != 2 || !found["R2"] || !found["L1"] || !strings.Contains(said.String(), "layers is no directory") {
		t.Errorf("exit code %d, found %v, said %s", code, found, said.String())
	}
	if _, code := h.try("fsck", "--root", filepath.Join(t.TempDir(), "none", "such"), "--host", "unix:///none"); code != couldNotRun {
		t.Errorf("nothing to check: exit code %d", code)
	}
}

// What is named is checked with all that it stands on, and nothing else.
func TestFsckOfAnImage(t *testing.T) {
	h := unclean(t)
	name, other := busybox(t), testkit.Registry(t).Push(t, testkit.Long(t, 2, 1<<20), "long:latest")
	h.run("pull", name)
	h.run("pull", other)
	files, err := filepath.Glob(filepath.Join(h.root, layout.LayersDir, "*", layout.TreeDir, "bin", "busybox"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	if err := os.Chmod(files[0], 0o700); err != nil {
		t.Fatal(err)
	}
	id := filepath.Base(filepath.Dir(filepath.Dir(filepath.Dir(files[0]))))
	for _, what := range []string{name, id, id[:8]} {
		if out, code := h.try("fsck", "--deep", what); code != 2 || strings.Count(out, "L4") != 1 || !strings.Contains(out, " of "+what+": 1 findings") {
			t.Errorf("of %s: exit code %d\n%s", what, code, out)
		}
	}
	if out := h.run("fsck", "--deep", other); !strings.Contains(out, ": clean: ") {
		t.Error(out)
	}
	if out, code := h.try("fsck", "nobody"); code != couldNotRun || !strings.Contains(out, `is called "nobody"`) {
		t.Errorf("of nobody: exit code %d\n%s", code, out)
	}
	if out := h.run("fsck", "--deep", "--repair", name); !strings.Contains(out, "healed") {
		t.Error(out)
	}
	// What was bad is kept until somebody says otherwise. A mode was set right
	// in its place, a byte calls for another file.
	if out := h.run("quarantine", "ls"); strings.Count(out, "\n") != 1 {
		t.Error(out)
	}
	for range 2 {
		h.spoil(files[0])
		h.run("fsck", "--deep", "--repair", name)
	}
	ids := strings.Fields(h.run("quarantine", "ls", "--quiet"))
	if out := h.run("quarantine", "ls"); len(ids) != 2 || !strings.Contains(out, "layer "+id) || !strings.Contains(out, name) {
		t.Error(ids, out)
	}
	if out, code := h.try("quarantine", "rm", ids[0], "nobody"); code == 0 {
		t.Error(out)
	}
	if out := h.run("quarantine", "rm", ids[0]); !strings.HasPrefix(out, "Deleted: 1, ") || len(strings.Fields(h.run("quarantine", "ls", "-q"))) != 1 {
		t.Error(out)
	}
	if out := h.run("quarantine", "rm", "--all"); !strings.HasPrefix(out, "Deleted: 1, ") || h.run("quarantine", "ls", "-q") != "" {
		t.Error(out)
	}
	for _, wrong := range [][]string{{"--sample", "5%"}, {"--deep", "--sample", "500%"}, {"--resume"}, {"--deep", "--resume", name}, {"--of-docker", "/", name}} {
		if out, code := h.try(append([]string{"fsck"}, wrong...)...); code == 0 {
			t.Errorf("%v: %s", wrong, out)
		}
	}
}

// spoil changes the first byte of a file.
func (h *host) spoil(name string) {
	h.t.Helper()
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt([]byte{0xff}, 0)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// A deep check that was called off, or whose process was killed, goes on.
func TestFsckGoesOn(t *testing.T) {
	h := newHost(t)
	h.run("pull", testkit.Registry(t).Push(t, testkit.Long(t, 8, 1<<20), "long:latest"))
	cmd := h.command("fsck", "--deep", "--rate", "4MB")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second) // of four
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("the check came to its end too soon")
	}
	if out := h.run("info"); !strings.Contains(out, "Checking:    the store, since ") {
		t.Error(out)
	}
	var cut, whole fsck.Report
	for i, r := range []*fsck.Report{&cut, &whole} {
		if err := json.Unmarshal([]byte(h.run("fsck", "--deep", "--json", fmt.Sprintf("--resume=%t", i == 0))), r); err != nil {
			t.Fatal(err)
		}
	}
	if cut.Resumed.IsZero() || cut.Bytes < whole.Bytes || cut.Bytes > whole.Bytes*3/2 || cut.Files != whole.Files {
		t.Errorf("it went on as %+v; at once it is %+v", cut, whole)
	}
	out := h.run("info")
	if !strings.Contains(out, "Checked:     the store, ") || !strings.Contains(out, ", clean\n") || strings.Contains(out, "Checking:") {
		t.Error(out)
	}
}

// The list has the whole law, and what each level costs.
func TestFsckList(t *testing.T) {
	cmd := newFsck(&globals{})
	var out strings.Builder
	cmd.SetOut(&out)
	cmd.SetArgs([]string{"--list"})
	if err := cmd.Execute(); err != nil {
		t.Fatal(err)
	}
	for _, inv := range layout.Invariants() {
		line := regexp.MustCompile(`(?m)^` + inv.ID + ` +` + string(inv.Severity) + ` +` + string(inv.Level) + ` +` + regexp.QuoteMeta(inv.Holds) + ` +` + regexp.QuoteMeta(inv.Repair) + `$`)
		if !line.MatchString(out.String()) || !strings.Contains(out.String(), "\n"+string(inv.Level)+" reads "+inv.Level.Cost()+"\n") {
			t.Errorf("%s is not in the list with what it costs", inv.ID)
		}
	}
}
