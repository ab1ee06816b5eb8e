package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"varve.dev/internal/corrupt"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// damaged is a host with an image whose store was damaged.
func damaged(t *testing.T, kind string) *host {
	t.Helper()
	testkit.NeedRoot(t)
	h := &host{t: t, bin: testkit.Binaries(t), root: filepath.Join(t.TempDir(), "root")} // not clean at the end
	h.env = append(os.Environ(), "VARVE_ROOT="+h.root, "VARVE_STATE="+t.TempDir())
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
