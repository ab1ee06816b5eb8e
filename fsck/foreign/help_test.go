package foreign_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"varve.dev/fsck/foreign"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func check(t *testing.T, engine foreign.Engine, root string) *foreign.Report {
	t.Helper()
	report, err := foreign.Run(t.Context(), foreign.Options{Engine: engine, Root: root})
	must(t, err)
	return report
}

// wantClean fails if anything at all was found.
func wantClean(t *testing.T, report *foreign.Report) {
	t.Helper()
	for _, f := range report.Findings {
		t.Errorf("%s %s %s %s%s: %s", f.Severity, f.Kind, f.Object, f.Path, f.File, f.Detail)
	}
	if report.ExitCode() != 0 {
		t.Errorf("exit code %d", report.ExitCode())
	}
}

// finding is what a test expects: of the kind, at a path that ends so.
type finding struct {
	kind     foreign.Kind
	severity layout.Severity
	at       string
}

func (f finding) String() string { return fmt.Sprintf("%s %s at …%s", f.severity, f.kind, f.at) }

func (f finding) is(g foreign.Finding) bool {
	return f.kind == g.Kind && f.severity == g.Severity && strings.HasSuffix(g.Path, f.at)
}

// wantFindings fails unless exactly these were found, each once, and counted.
func wantFindings(t *testing.T, report *foreign.Report, want ...finding) {
	t.Helper()
	rest := slices.Clone(want)
	for _, f := range report.Findings {
		i := slices.IndexFunc(rest, func(w finding) bool { return w.is(f) })
		if i < 0 {
			t.Errorf("not expected: %s %s %s %s: %s", f.Severity, f.Kind, f.Object, f.Path, f.Detail)
			continue
		}
		rest = slices.Delete(rest, i, i+1)
		if f.Severity != layout.Notice && (f.Detail == "" || f.Repair == "") {
			t.Errorf("%s has no detail, or no repair: %q, %q", f.Path, f.Detail, f.Repair)
		}
	}
	for _, w := range rest {
		t.Errorf("not found: %s", w)
	}
	code := 0
	for _, w := range want {
		code = max(code, map[layout.Severity]int{layout.Damage: 1, layout.Loss: 2}[w.severity])
	}
	if report.ExitCode() != code {
		t.Errorf("exit code %d, want %d", report.ExitCode(), code)
	}
}

// copyOf copies a store, with all that its files are.
func copyOf(t *testing.T, dir string) string {
	t.Helper()
	copied := filepath.Join(t.TempDir(), "copy")
	out, err := exec.Command("cp", "-a", dir, copied).CombinedOutput()
	if err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	return copied
}

// Damages that are done by hand.

func truncate(name string) error { return os.Truncate(name, 0) }

func shorten(name string) error {
	fi, err := os.Stat(name)
	if err != nil {
		return err
	}
	return keepTime(name, func() error { return os.Truncate(name, fi.Size()-1) })
}

func lengthen(name string) error {
	fi, err := os.Stat(name)
	if err != nil {
		return err
	}
	return keepTime(name, func() error { return os.Truncate(name, fi.Size()+1) })
}

// flip changes one bit in the middle of a file, and nothing else of it.
func flip(name string) error {
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	data[len(data)/2] ^= 0x10
	return overwrite(name, data)
}

func overwrite(name string, data []byte) error {
	return keepTime(name, func() error {
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_TRUNC, 0)
		if err != nil {
			return err
		}
		_, err = f.Write(data)
		return errors.Join(err, f.Close())
	})
}

func keepTime(name string, change func() error) error {
	fi, err := os.Stat(name)
	if err != nil {
		return err
	}
	return errors.Join(change(), os.Chtimes(name, fi.ModTime(), fi.ModTime()))
}

// keepDirTime changes the names in a folder, and not the folder's time.
func keepDirTime(name string, change func() error) error {
	return keepTime(filepath.Dir(name), change)
}

// listed describes everything in a folder, to see that it is left alone.
func listed(t *testing.T, dir string) []string {
	t.Helper()
	lines, err := testkit.ListTree(dir)
	must(t, err)
	return lines
}

// wantUntouched fails if a check has changed something.
func wantUntouched(t *testing.T, dir string, before []string) {
	t.Helper()
	if after := listed(t, dir); !slices.Equal(before, after) {
		t.Error("the check has changed the store")
	}
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return !errors.Is(err, fs.ErrNotExist)
}
