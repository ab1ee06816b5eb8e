package crashtest

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	bolt "go.etcd.io/bbolt"

	"varve.dev/daemon"
	"varve.dev/durable"
	"varve.dev/durable/crashsim"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// minimumImages is lowered by nobody without saying why.
const minimumImages = 100

// simulatedMoments is about how many changes of the workload are followed by
// the images of a power cut; VARVE_ALL_CRASHES=1 takes every change.
const simulatedMoments = 40

// TestSimulatedPowerCut cuts the power of a store at work at every k-th change
// that it makes to its files, in a simulation: what the campaigns on real file
// systems leave to chance, the moment, is exact here.
func TestSimulatedPowerCut(t *testing.T) {
	s := &simulation{place: newPlace(t, 3, 10)}
	changes := s.run(t, 0, nil) // counts only
	every := max(1, changes/simulatedMoments)
	if os.Getenv("VARVE_ALL_CRASHES") != "" {
		every = 1
	}
	s.run(t, every, nil)
	for _, w := range s.wrong {
		t.Error(w)
	}
	t.Logf("%d changes, %d images: every %d. change", changes, s.images, every)
	if s.images < minimumImages {
		t.Errorf("%d crash images, the committed minimum is %d", s.images, minimumImages)
	}
}

// TestSimulatedBugIsSeen leaves out one thing at a time that has to become
// durable. The simulation has to notice each.
func TestSimulatedBugIsSeen(t *testing.T) {
	at := newPlace(t, 3, 10)
	for name, leave := range map[string]func(durable.OpKind, string) bool{
		"the sync of the directory of layers": func(kind durable.OpKind, name string) bool {
			return kind == durable.OpSyncDir && name == layout.LayersDir
		},
		"the syncs of the directories of blobs": func(kind durable.OpKind, name string) bool {
			return kind == durable.OpSyncDir && strings.HasPrefix(name, layout.BlobsDir)
		},
		"the contents of layers": func(kind durable.OpKind, name string) bool {
			return kind == durable.OpBarrier && strings.HasPrefix(name, layout.StagingDir)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := &simulation{place: at}
			s.run(t, 60, leave)
			t.Logf("%d images, %d faults", s.images, len(s.wrong))
			if len(s.wrong) == 0 {
				t.Error("nothing shows that it is left out")
			}
		})
	}
}

// simulation runs the workload over a simulated disk.
type simulation struct {
	place
	images int
	wrong  []string

	mu    sync.Mutex
	marks []string
	known facts
}

// run cuts the power after every k-th change, and returns how many there were.
func (s *simulation) run(t *testing.T, every int, leave func(durable.OpKind, string) bool) (changes int) {
	t.Helper()
	t.Setenv("VARVE_RUNTIME", s.shim)
	s.marks, s.known = nil, factsOf(nil)
	var sim *crashsim.Sim
	opened := func(root *durable.Root, db *metadata.DB) {
		copyTo := func(w io.Writer) error {
			return db.ForCheck().View(func(tx *bolt.Tx) error { _, err := tx.WriteTo(w); return err })
		}
		var err error
		if sim, err = crashsim.Attach(root, crashsim.Database{Name: layout.DatabaseFile, Copy: copyTo}); err != nil {
			t.Error(err)
			return
		}
		sim.LeaveOut(leave)
		sim.Every(every, func(m crashsim.Moment) { s.cut(t, m) })
	}
	err := doWork(t.TempDir(), daemon.Options{State: s.state, Opened: opened}, s.remote, s.mark)
	if err != nil {
		t.Fatal(err)
	}
	if err := sim.Err(); err != nil {
		t.Error(err)
	}
	return sim.Ops()
}

func (s *simulation) mark(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	line := fmt.Sprintf(format, args...)
	if f, ok := strings.CutPrefix(line, fact); !ok {
		s.marks = append(s.marks, line)
	} else {
		for id, hash := range factsOf([]string{f}).layers {
			s.known.layers[id] = hash
		}
	}
}

func (s *simulation) told() ledger {
	s.mu.Lock()
	defer s.mu.Unlock()
	return ledgerOf(s.marks)
}

// cut judges what a power cut at this moment leaves: nothing of what is not
// durable, all of it, some.
func (s *simulation) cut(t *testing.T, at crashsim.Moment) {
	for _, mode := range []crashsim.Mode{crashsim.None, crashsim.All, crashsim.Some} {
		s.images++
		dir := filepath.Join(imageScratch(t), "store")
		before := s.told()
		if err := at.Image(dir, mode, uint64(s.images)); err != nil {
			t.Error(err)
			return
		}
		// The change may be the sweeper's, which the workload does not wait
		// for: what it changed while the image was made is in doubt.
		told := s.told()
		for name, there := range told {
			if was, known := before[name]; !known || was != there {
				delete(told, name)
			}
		}
		for _, w := range s.judge(dir, told, s.known, false).wrong {
			s.wrong = append(s.wrong, fmt.Sprintf("change %d (%s), image %d (%s): %s", at.N, at.Op.Path, s.images, mode, w))
		}
		os.RemoveAll(dir)
	}
}

// imageScratch is in memory if there is such a place: an image is judged and
// thrown away.
func imageScratch(t *testing.T) string {
	if dir, err := os.MkdirTemp("/dev/shm", "varve-crash-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(dir) })
		return dir
	}
	return t.TempDir()
}
