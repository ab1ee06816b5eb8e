package crashtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/internal/faultcall"
	"varve.dev/internal/powercut"
	"varve.dev/internal/testkit"
)

// barrierPairs is how often each is measured, in turn with the other; PAIRS says
// otherwise.
const barrierPairs = 7

// slowFlush is what a flush takes more on a disk that is slow at it.
const slowFlush = 5 * time.Millisecond

// maxCost is what durability may cost: a quarter of the same pull without.
const maxCost = 1.25

// timings skips a test that measures, unless it was asked for.
func timings(t *testing.T) {
	t.Helper()
	if os.Getenv("VARVE_TIMINGS") == "" {
		t.Skip("it measures times: make barrier")
	}
}

// pullTimed pulls an image into a new store and says how long it took. args
// are those of place, and the image's name.
func pullTimed(dir string, args []string, mark func(string, ...any)) error {
	ctx := context.Background()
	e, err := daemon.Open(ctx, daemon.Options{Root: filepath.Join(dir, "store"), State: args[0]})
	if err != nil {
		return err
	}
	mark(fact + "begins")
	began := time.Now()
	_, err = e.Pull(ctx, varve.PullRequest{Reference: args[1] + "/" + args[2], Registry: varve.Registry{PlainHTTP: true}}, nil)
	took := time.Since(began)
	if err := errors.Join(err, e.Close(ctx)); err != nil {
		return err
	}
	mark(fact+"took %d", took)
	return os.RemoveAll(filepath.Join(dir, "store"))
}

// timedPull runs pullTimed in a worker in which the system calls skip do
// nothing.
func (p place) timedPull(t *testing.T, dir, image, skip string) time.Duration {
	t.Helper()
	took, _ := p.watchedPull(t, dir, image, skip, nil)
	return took
}

// watchedPull is timedPull under a watch, and returns what that saw of the pull.
func (p place) watchedPull(t *testing.T, dir, image, skip string, watch *faultcall.Watch) (took time.Duration, seen []faultcall.Change) {
	t.Helper()
	before := 0
	w := p.worker("pull")
	w.Skip, w.Watch = skip, watch
	w.Mark = func(line string) {
		if watch != nil {
			seen, _ = watch.Seen()
		}
		if s, ok := strings.CutPrefix(line, fact+"took "); ok {
			n, _ := strconv.ParseInt(s, 10, 64)
			took, seen = time.Duration(n), seen[before:]
		} else {
			before = len(seen)
		}
	}
	if err := w.Run(dir, p.state, p.remote, image); err != nil {
		t.Fatal(err)
	}
	return took, seen
}

// TestBarrierCost pulls an image of 3,000 files with everything synced and
// with nothing, in turn, on a disk whose flushes cost nothing and on one where
// each takes 5 ms.
func TestBarrierCost(t *testing.T) {
	timings(t)
	at := newPlace(t, stackedLayers, stackedFiles)
	for _, kind := range kinds(t) {
		for _, flush := range []time.Duration{0, slowFlush} {
			t.Run(fmt.Sprintf("%s, a flush takes %v more", kind, flush), func(t *testing.T) {
				rig := newRig(t)
				disk, err := rig.Format(kind, diskSize(stackedFiles))
				if err != nil {
					t.Fatal(err)
				}
				rec := powercut.Record(disk)
				rec.FlushTime = flush
				m, err := rig.MountRecording(kind, rec)
				if err != nil {
					t.Fatal(err)
				}
				r := ratios(t, func() (a, b time.Duration) {
					return at.timedPull(t, m.Dir, stackedName, ""), at.timedPull(t, m.Dir, stackedName, everySync)
				})
				if err := m.Unmount(); err != nil {
					t.Fatal(err)
				}
				// No limit is set: this disk is a program on the same
				// processors, and what is not synced never reaches it.
				t.Logf("with syncs / without: %s", r)
			})
		}
	}
}

// TestBarrierCostHere is the same on this machine's own disk, and with an image
// of 1 GB too.
func TestBarrierCostHere(t *testing.T) {
	timings(t)
	at := newPlace(t, stackedLayers, stackedFiles)
	dir, err := os.MkdirTemp("/var/tmp", "varve-barrier-")
	must(t, err)
	defer os.RemoveAll(dir)
	for _, c := range []struct {
		what, image string
	}{{"20 layers, 3,000 small files", stackedName}, {"9 layers, 35,000 files, 1 GB", bigName}} {
		if c.image == bigName {
			at.registry.Push(t, testkit.Big(t), bigName)
		}
		at.timedPull(t, dir, c.image, "") // warms what the first one warms
		for _, flush := range []time.Duration{0, slowFlush} {
			t.Run(fmt.Sprintf("%s, a flush takes %v more", c.what, flush), func(t *testing.T) {
				at.barrierCost(t, dir, c.image, flush)
			})
		}
	}
}

// barrierCost measures both sides under the same watch, which stops at flushes
// and at nothing else.
func (p place) barrierCost(t *testing.T, dir, image string, flush time.Duration) {
	pull := func(skip string) (time.Duration, []faultcall.Change) {
		watch := faultcall.New(faultcall.Plan{Below: []string{dir}, Calls: faultcall.Flushes(), Delay: flush})
		return p.watchedPull(t, dir, image, skip, watch)
	}
	r := ratios(t, func() (a, b time.Duration) {
		a, flushes := pull("")
		b, _ = pull(everySync)
		t.Logf("%v with %d flushes, %v without", a, len(flushes), b)
		return a, b
	})
	t.Logf("with syncs / without: %s", r)
	if r.median() > maxCost {
		t.Errorf("durability costs %s of a pull", r)
	}
}

// TestStrangersDirtyPages pulls beside 4 GiB that somebody else has written to
// the same file system and not synced.
func TestStrangersDirtyPages(t *testing.T) {
	timings(t)
	at := newPlace(t, stackedLayers, stackedFiles)
	dir, err := os.MkdirTemp("/var/tmp", "varve-dirty-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	at.timedPull(t, dir, stackedName, "") // warms what the first one warms
	r := ratios(t, func() (beside, alone time.Duration) {
		alone = at.timedPull(t, dir, stackedName, "")
		strangers := filepath.Join(dir, "strangers")
		must(t, dirty(strangers, 4<<30))
		left := dirtyBytes(t)
		beside = at.timedPull(t, dir, stackedName, "")
		t.Logf("alone %v; beside %d MiB of dirty pages %v", alone, left>>20, beside)
		must(t, os.Remove(strangers))
		return beside, alone
	})
	t.Logf("beside strangers' pages / alone: %s", r)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// dirty writes size bytes and does not sync them.
func dirty(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, zeros{}, size)
	return errors.Join(err, f.Close())
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// dirtyBytes is what the kernel has yet to write, of all file systems.
func dirtyBytes(t *testing.T) (n int64) {
	t.Helper()
	data, err := os.ReadFile("/proc/meminfo")
	must(t, err)
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); f[0] == "Dirty:" || f[0] == "Writeback:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			must(t, err)
			n += kib << 10
		}
	}
	return n
}

// spread are ratios in order.
type spread []float64

func ratios(t *testing.T, pair func() (a, b time.Duration)) (r spread) {
	for range number(t, "PAIRS", barrierPairs) {
		a, b := pair()
		r = append(r, a.Seconds()/b.Seconds())
	}
	slices.Sort(r)
	return r
}

func (r spread) median() float64 { return r[len(r)/2] }

func (r spread) String() string {
	return fmt.Sprintf("%.2f (%.2f to %.2f, %d pairs)", r.median(), r[0], r[len(r)-1], len(r))
}
