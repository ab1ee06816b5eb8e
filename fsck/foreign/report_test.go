package foreign_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"varve.dev/fsck/foreign"
	"varve.dev/layout"
)

func TestReport(t *testing.T) {
	r := makeDocker(t, bitOfAll(t))
	must(t, truncate(filepath.Join(r.tree(0), "hard")), os.Chmod(filepath.Join(r.tree(0), "null"), 0o600),
		os.WriteFile(filepath.Join(r.tree(1), "a\x1b[2J"), nil, 0o600))
	full := check(t, foreign.Docker, r.dir)
	want := map[foreign.Kind]int64{foreign.Empty: 2, foreign.Mode: 1, foreign.Time: 2, foreign.Extra: 1}
	for kind, n := range want {
		if full.Counts[kind] != n {
			t.Errorf("%d %s, want %d", full.Counts[kind], kind, n)
		}
	}
	var text bytes.Buffer
	full.WriteText(&text)
	for _, line := range []string{
		"layer " + r.chains[0].String() + " of " + dockerName + "\n", "    empty     /d/file: 0 bytes, must be 19\n",
		"    extra     \"/a\\x1b[2J\": ", "    repair: remove it\n", "damaged (2 empty, 1 extra, 1 mode, 2 time): 1 images, 2 layers",
	} {
		if !strings.Contains(text.String(), line) {
			t.Errorf("the text lacks %q", line)
		}
	}
	if n := strings.Count(text.String(), "repair: remove the images"); n != 1 {
		t.Errorf("one repair is said %d times\n%s", n, &text)
	}

	data, err := json.Marshal(full)
	must(t, err)
	var fields struct {
		Findings []map[string]any
	}
	must(t, json.Unmarshal(data, &fields))
	for _, name := range []string{"kind", "severity", "object", "images", "path", "file", "detail", "repair"} {
		if fields.Findings[0][name] == nil {
			t.Errorf("the JSON lacks %s: %v", name, fields.Findings[0])
		}
	}
}

// Findings past the limit are counted, and count for the exit code.
func TestLimit(t *testing.T) {
	r := makeDocker(t, bitOfAll(t))
	must(t, os.RemoveAll(r.path("image/overlay2/distribution")), os.Chmod(filepath.Join(r.tree(0), "capable"), 0o600), flip(filepath.Join(r.tree(0), "d/other")))
	report, err := foreign.Run(t.Context(), foreign.Options{Engine: foreign.Docker, Root: r.dir, Limit: 1})
	must(t, err)
	if len(report.Findings) != 1 || report.Findings[0].Severity != layout.Damage || report.Omitted != 1 || report.ExitCode() != 2 || report.Counts[foreign.Altered] != 1 {
		t.Errorf("%+v", report)
	}
	var text bytes.Buffer
	report.WriteText(&text)
	if !strings.Contains(text.String(), "and 1 findings more") {
		t.Errorf("%s", &text)
	}
}
