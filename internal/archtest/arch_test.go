package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/ARCHITECTURE.md")

const page = "../../docs/ARCHITECTURE.md"

func TestPageIsPrinted(t *testing.T) {
	var want bytes.Buffer
	Print(&want)
	if *update {
		if err := os.WriteFile(page, want.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Error("docs/ARCHITECTURE.md is not what archtest says: go test ./internal/archtest -update")
	}
}

// listed is what `go list` says of a package.
type listed struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func packages(t *testing.T) map[string]listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-tags", "seccomp", "-json=ImportPath,Imports,Deps", "varve.dev/...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]listed{}
	dec := json.NewDecoder(bytes.NewReader(out))
	for {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimPrefix(p.ImportPath, "varve.dev/")] = p
	}
}

// onlyTests are packages of a storey that nothing but tests imports.
var onlyTests = map[string]bool{"durable/crashsim": true}

// forTests tells whether a package serves the tests, outside of the storeys.
func forTests(name string) bool {
	for _, dir := range []string{"internal/testkit", "internal/teststore", "internal/testbuild", "internal/powercut", "internal/faultcall", "internal/crashtest", "internal/corrupt", "internal/corrupttest", "internal/corpustest", "internal/limittest", "internal/tables", "internal/archtest", "benchmarks", "examples"} {
		if name == dir || strings.HasPrefix(name, dir+"/") {
			return true
		}
	}
	return false
}

func TestStoreys(t *testing.T) {
	level := map[string]int{}
	for i, s := range storeys {
		for _, p := range s.packages {
			level[p] = i
		}
	}
	all := packages(t)
	for name, p := range all {
		if forTests(name) {
			continue
		}
		mine, known := level[name]
		if !known {
			t.Errorf("package %s has no storey", name)
			continue
		}
		for _, imported := range p.Imports {
			other, ours := strings.CutPrefix(imported, "varve.dev/")
			if !ours {
				continue
			}
			if theirs, known := level[other]; !known || onlyTests[other] {
				t.Errorf("%s imports %s, which is for tests", name, other)
			} else if theirs >= mine {
				t.Errorf("%s (storey %d) imports %s (storey %d)", name, mine, other, theirs)
			}
		}
	}
	for name := range level {
		if _, there := all[name]; !there {
			t.Errorf("storey %d names package %s, which does not exist", level[name], name)
		}
	}
}

func TestRules(t *testing.T) {
	all := packages(t)
	for _, r := range rules {
		for _, dep := range all[r.from].Deps {
			if dep == r.never || strings.HasPrefix(dep, strings.TrimSuffix(r.never, "/")+"/") {
				// What the standard library needs is not our import.
				if r.never == "os" && !imports(all[r.from], "os") {
					continue
				}
				t.Errorf("%s imports %s, and must not: %s", r.from, dep, r.reason)
			}
		}
	}
}

func imports(p listed, name string) bool {
	for _, i := range p.Imports {
		if i == name {
			return true
		}
	}
	return false
}
