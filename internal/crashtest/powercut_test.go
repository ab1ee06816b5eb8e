package crashtest

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"varve.dev/internal/powercut"
	"varve.dev/internal/testkit"
)

// TestPowerCut cuts the power while a store pulls, tags, builds and removes
// images. Whatever is on the disk afterwards, the store opens, has all that
// was acknowledged with every file as it was, and nothing that the witness
// finds fault with.
func TestPowerCut(t *testing.T) {
	at := newPlace(t, stackedLayers, 150)
	for _, kind := range kinds(t) {
		t.Run(string(kind), func(t *testing.T) {
			c := campaign{place: at, rig: newRig(t), kind: kind}
			bad := 0
			c.run(t, "", caseCount(t, 8), func(wrong string) bool {
				t.Error(wrong)
				bad++
				return bad < 20
			})
		})
	}
}

// TestPlantedBugIsSeen leaves out, by a system call filter, one of the calls
// that the order of writes stands on. The campaign has to notice each.
func TestPlantedBugIsSeen(t *testing.T) {
	at := newPlace(t, stackedLayers, 150)
	bugs := map[powercut.FileSystem][]string{
		powercut.Ext4:  {"fsync", "sync_file_range"},
		powercut.XFS:   {"fsync", "sync_file_range"},
		powercut.Btrfs: {"fdatasync", "syncfs"}, // names go with syncfs, too
	}
	for _, kind := range kinds(t) {
		for _, call := range bugs[kind] {
			t.Run(string(kind)+" without "+call, func(t *testing.T) {
				c := campaign{place: at, rig: newRig(t), kind: kind}
				seen := false
				c.run(t, call, 100, func(wrong string) bool {
					t.Logf("seen: %.600s", wrong)
					seen = true
					return false
				})
				if !seen {
					t.Error("no cut shows that the call is left out")
				}
			})
		}
	}
}

// campaign is one recording and its cuts.
type campaign struct {
	place
	rig  *powercut.Rig
	kind powercut.FileSystem
}

// stackedLayers are the layers of the campaigns' image.
const stackedLayers = 20

// maxPullFlushes is how many flushes a pull may take, whatever number of files
// it has.
func maxPullFlushes(_ powercut.FileSystem, layers int) int { return 10 + layers }

// againEvery is how often a recovered store is used again.
const againEvery = 8

// run records the workload, in which the system call skip does nothing, and
// looks at the aftermath of n cuts until fault, which is told of each that is
// not as it has to be, returns false.
func (c campaign) run(t *testing.T, skip string, n int, fault func(string) bool) {
	w := c.worker("work")
	w.Skip = skip
	rec, lines := record(t, c.rig, c.kind, w, c.state, c.remote)
	known := factsOf(lines)
	images := rec.Replay()
	tried, bad := 0, 0
	for i, cut := range rec.Choose(n, seed(t)) {
		var args []string
		if i%againEvery == againEvery-1 {
			args = []string{again}
		}
		tried++
		marks := rec.Marks(cut.At)
		wrong := c.aftermath(t, images.Image(cut), ledgerOf(marks), known, args...)
		if len(wrong) == 0 {
			continue
		}
		bad++
		if !fault(fmt.Sprintf("%s, after %q:\n  %s", cut, marks[max(0, len(marks)-1):], strings.Join(wrong, "\n  "))) {
			break
		}
	}
	pull := "+" + c.remote + "/" + stackedName
	if flushes := rec.Count(rec.Find("will "+pull), rec.Find("did "+pull)).Flushes; flushes > maxPullFlushes(c.kind, stackedLayers) {
		t.Errorf("a pull of %d layers takes %d flushes", stackedLayers, flushes)
	} else {
		t.Logf("a pull of %d layers takes %d flushes", stackedLayers, flushes)
	}
	count := rec.Count(0, rec.Len())
	t.Logf("%d writes of %d MiB, %d flushes, %d marks, %d layers; %d cuts, %d of them bad",
		count.Writes, count.Bytes>>20, count.Flushes, count.Marks, len(known.layers), tried, bad)
}

// aftermath starts the machine again, so to speak.
func (c campaign) aftermath(t *testing.T, disk *powercut.Disk, told ledger, known facts, args ...string) []string {
	m, err := c.rig.Mount(c.kind, disk)
	if err != nil {
		return []string{err.Error()}
	}
	wrong := c.judge(m.Dir, told, known, args...)
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	return wrong
}

// diskSize is enough for the workloads and for the smallest xfs and btrfs.
const diskSize = 1 << 30

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
func record(t *testing.T, rig *powercut.Rig, kind powercut.FileSystem, w powercut.Worker, args ...string) (rec *powercut.Recording, facts []string) {
	t.Helper()
	disk, err := rig.Format(kind, diskSize)
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
