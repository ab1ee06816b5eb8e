package crashtest

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"varve.dev/internal/powercut"
	"varve.dev/internal/testkit"
)

// diskSize is enough for a workload with so many files in a layer, and for the
// smallest xfs and btrfs. In bytes; only what is written takes memory.
func diskSize(files int) int64 { return 1<<30 + int64(files)*2<<20 }

func newRig(t *testing.T) *powercut.Rig {
	t.Helper()
	testkit.NeedRoot(t)
	for program, pkg := range map[string]string{"mkfs.ext4": "e2fsprogs", "mkfs.xfs": "xfsprogs", "mkfs.btrfs": "btrfs-progs"} {
		testkit.Need(t, program, pkg)
	}
	r, err := powercut.NewRig(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// record formats a disk and runs a worker on it, whose marks go into the log.
func record(t *testing.T, rig *powercut.Rig, kind powercut.FileSystem, size int64, w powercut.Worker, args ...string) (rec *powercut.Recording, facts []string) {
	t.Helper()
	disk, err := rig.Format(kind, size)
	if err != nil {
		t.Fatal(err)
	}
	rec = powercut.Record(disk)
	m, err := rig.MountRecording(kind, rec)
	if err != nil {
		t.Fatal(err)
	}
	w.Mark = func(line string) {
		if f, ok := strings.CutPrefix(line, fact); ok {
			facts = append(facts, f)
		} else {
			rec.Mark(line)
		}
	}
	err = w.Run(m.Dir, args...)
	if uerr := m.Unmount(); uerr != nil {
		t.Fatal(uerr)
	}
	if err != nil {
		t.Fatal(err)
	}
	return rec, facts
}

// caseCount, seed and kinds are what the make target asks for.
func caseCount(t *testing.T, otherwise int) int { return int(number(t, "CASES", uint64(otherwise))) }
func seed(t *testing.T) uint64                  { return number(t, "SEED", 1) }

func number(t *testing.T, variable string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n
}

func kinds(t *testing.T) []powercut.FileSystem {
	t.Helper()
	name := os.Getenv("FS")
	if name == "" {
		return powercut.FileSystems()
	}
	kind, err := powercut.ParseFileSystem(name)
	if err != nil {
		t.Fatal(err)
	}
	return []powercut.FileSystem{kind}
}
