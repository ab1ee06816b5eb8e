package daemon

import (
	"os"
	"path/filepath"
	"testing"

	"varve.dev/internal/testbuild"
	"varve.dev/internal/testkit"
)

// maxRebuildCommits is how many commits of the database a build takes that comes
// from the cache whole: a lease, what it keeps of what was looked up, the Dockerfile
// that is compared, and their end.
const maxRebuildCommits = 12

// A build that comes from the cache whole leaves nothing behind, and writes little:
// its commits, which are synced, are most of its time.
func TestRebuildWritesLittle(t *testing.T) {
	testkit.NeedRoot(t)
	k := keep(t, testPlace(t))
	dir := t.TempDir()
	for name, text := range map[string]string{"Dockerfile": "FROM scratch\nCOPY . /\n", "a": "a", "sub/b": "b"} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	db := k.term.engine.db
	layers := func() int {
		entries, err := os.ReadDir(k.term.engine.root.Path("layers"))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	var commits int64
	var kept int
	for round := range 4 {
		before, _ := db.Commits()
		if _, err := testbuild.Run(t.Context(), k, testbuild.Build{Name: "app:latest", Dir: dir}); err != nil {
			t.Fatal(err)
		}
		after, _ := db.Commits()
		switch commits = after - before; {
		case round == 0:
			kept = layers()
		case commits > maxRebuildCommits:
			t.Errorf("round %d: %d commits, more than %d", round, commits, maxRebuildCommits)
		case layers() != kept:
			t.Errorf("round %d: %d layers, there were %d", round, layers(), kept)
		}
	}
	// What has changed makes one.
	if err := os.WriteFile(filepath.Join(dir, "a"), []byte("A"), 0o644); err != nil {
		t.Fatal(err)
	}
	r, err := testbuild.Run(t.Context(), k, testbuild.Build{Name: "app:latest", Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if r.Ran != 1 || layers() != kept+2 {
		t.Errorf("after a change %d steps ran, and there are %d layers where %d were", r.Ran, layers(), kept)
	}
	t.Logf("%d commits", commits)
}
