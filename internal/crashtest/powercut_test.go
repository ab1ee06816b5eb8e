package crashtest

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"varve.dev/internal/powercut"
)

// The campaigns' images: of 3,000 files, and for a few cuts of 30,000.
const (
	stackedLayers = 20
	stackedFiles  = 150 // in each layer
	largeFiles    = 1500
	largeShare    = 20 // of the cuts, one in so many is of the large one
)

// TestPowerCut cuts the power while a store pulls, tags, builds, commits,
// pushes, saves, loads, checks and removes. Whatever is on the disk afterwards,
// the store opens, has all that was acknowledged with every file as it was, and
// nothing that the witness finds fault with.
func TestPowerCut(t *testing.T) {
	images := map[int]int{stackedFiles: caseCount(t, 8), largeFiles: caseCount(t, 0) / largeShare}
	for _, files := range []int{stackedFiles, largeFiles} {
		if images[files] == 0 {
			continue
		}
		at := newPlace(t, stackedLayers, files)
		for _, kind := range kinds(t) {
			t.Run(fmt.Sprintf("%s, %d files", kind, stackedLayers*files), func(t *testing.T) {
				c := campaign{place: at, rig: newRig(t), kind: kind, files: files}
				bad := 0
				tell(t, powerCutTable, c.run(t, "", images[files], func(wrong string) bool {
					t.Error(wrong)
					bad++
					return bad < 20
				}))
			})
		}
	}
}

// TestPlantedBugIsSeen leaves out, by a system call filter, one of the calls
// that the order of writes stands on, or all of them. The campaign has to
// notice each.
func TestPlantedBugIsSeen(t *testing.T) {
	at := newPlace(t, stackedLayers, stackedFiles)
	bugs := map[powercut.FileSystem][]string{
		powercut.Ext4:  {everySync, "fsync", "sync_file_range"},
		powercut.XFS:   {everySync, "fsync", "sync_file_range"},
		powercut.Btrfs: {everySync, "fdatasync", "syncfs"}, // names go with syncfs, too
	}
	for _, kind := range kinds(t) {
		for _, calls := range bugs[kind] {
			t.Run(string(kind)+" without "+calls, func(t *testing.T) {
				c := campaign{place: at, rig: newRig(t), kind: kind, files: stackedFiles}
				seen := ""
				o := c.run(t, calls, 100, func(wrong string) bool {
					t.Logf("seen: %.600s", wrong)
					seen = wrong
					return false
				})
				if seen == "" {
					t.Error("no cut shows that the calls are left out")
				}
				_, what, _ := strings.Cut(seen, "\n  ")
				what, _, _ = strings.Cut(strings.ReplaceAll(what, at.remote+"/", ""), "\n")
				if strings.Contains(what, "open, round") {
					what = "the store does not open"
				}
				tell(t, plantedTable, row{string(kind), calls, fmt.Sprintf("cut %d of %d", o.tried, o.asked), fmt.Sprintf("%.80s", what)})
			})
		}
	}
}

// everySync are the calls that make anything durable.
const everySync = "fsync,fdatasync,sync_file_range,syncfs"

// campaign is one recording and its cuts.
type campaign struct {
	place
	rig   *powercut.Rig
	kind  powercut.FileSystem
	files int // of each layer
}

// maxPullFlushes is how many flushes a pull may take, whatever number of files
// it has.
func maxPullFlushes(layers int) int { return 10 + layers }

// againEvery is how often a recovered store is used again.
const againEvery = 8

// judges is how many cuts are looked at at once.
const judges = 2

// outcome is what came of a campaign.
type outcome struct {
	campaign
	events, pull powercut.Count
	asked, tried int
	cuts         []powercut.Cut
	notStarted   int
	bad          int
	again        int   // stores that were used again
	fetched      int64 // most that one of them fetched, in bytes
	size         int64 // of the image
	took         time.Duration
}

// run records the workload, in which the system calls skip do nothing, and
// looks at the aftermath of n cuts until fault, which is told of each that is
// not as it has to be, returns false.
func (c campaign) run(t *testing.T, skip string, n int, fault func(string) bool) *outcome {
	began := time.Now()
	w := c.worker("work")
	w.Skip = skip
	rec, lines := record(t, c.rig, c.kind, diskSize(c.files), w, c.state, c.remote)
	known := factsOf(lines)
	o := &outcome{campaign: c, events: rec.Count(0, rec.Len()), cuts: rec.Choose(n, seed(t)), asked: n, size: known.size}
	pull := "+" + c.remote + "/" + stackedName
	o.pull = rec.Count(rec.Find("will "+pull), rec.Find("did "+pull))
	// A pull that takes long sees the file system's own flushes, too.
	if c.files == stackedFiles && o.pull.Flushes > maxPullFlushes(stackedLayers) {
		t.Errorf("a pull of %d layers takes %d flushes", stackedLayers, o.pull.Flushes)
	}
	var mu sync.Mutex
	stop := false
	g := errgroup.Group{}
	for j := range judges {
		g.Go(func() error {
			images := rec.Replay()
			for i := j; i < len(o.cuts); i += judges {
				mu.Lock()
				over := stop
				mu.Unlock()
				if over {
					return nil
				}
				cut := o.cuts[i]
				marks := rec.Marks(cut.At)
				found := c.aftermath(images.Image(cut), ledgerOf(marks), known, i%againEvery == againEvery-1)
				mu.Lock()
				if o.add(found); len(found.wrong) > 0 && !stop {
					stop = !fault(fmt.Sprintf("%s, after %q:\n  %s", cut, marks[max(0, len(marks)-1):], strings.Join(found.wrong, "\n  ")))
				}
				mu.Unlock()
			}
			return nil
		})
	}
	_ = g.Wait()
	o.took = time.Since(began)
	return o
}

func (o *outcome) add(f found) {
	o.tried++
	if len(f.wrong) > 0 {
		o.bad++
	}
	if !f.started {
		o.notStarted++
	}
	if f.again {
		o.again++
		o.fetched = max(o.fetched, f.fetched)
	}
}

var powerCutTable = table{"power cuts", row{"file system", "image", "one run of the workload", "a pull of it",
	"cuts: after a promise, after a flush, in between", "not flushed: none, some, all of it there", "stores that did not start", "wrong",
	"used again, fetched at most", "time"}}

var plantedTable = table{"planted bugs", row{"file system", "calls that do nothing", "seen at", "first thing wrong"}}

// Row is the outcome for a table.
func (o *outcome) Row() row {
	moments, tails := map[powercut.Moment]int{}, map[powercut.Tail]int{}
	for _, c := range o.cuts[:o.tried] {
		moments[c.After]++
		tails[c.Tail]++
	}
	return row{
		string(o.kind), fmt.Sprintf("%d layers, %d files", stackedLayers, stackedLayers*o.files),
		fmt.Sprintf("%d writes (%d MiB), %d flushes", o.events.Writes, o.events.Bytes>>20, o.events.Flushes),
		fmt.Sprintf("%d flushes", o.pull.Flushes),
		fmt.Sprintf("%d, %d, %d", moments[powercut.AfterMark], moments[powercut.AfterFlush], moments[powercut.AfterWrite]),
		fmt.Sprintf("%d, %d, %d", tails[powercut.None], tails[powercut.Some], tails[powercut.All]),
		fmt.Sprint(o.notStarted), fmt.Sprint(o.bad),
		fmt.Sprintf("%d stores, %.0f %% of the image", o.again, 100*float64(o.fetched)/float64(max(o.size, 1))),
		fmt.Sprintf("%d s", int(o.took.Seconds())),
	}
}

// aftermath starts the machine again, so to speak.
func (c campaign) aftermath(disk *powercut.Disk, told ledger, known facts, again bool) found {
	m, err := c.rig.Mount(c.kind, disk)
	if err != nil {
		return found{wrong: []string{err.Error()}}
	}
	f := c.judge(m.Dir, told, known, again)
	if err := m.Unmount(); err != nil {
		f.wrong = append(f.wrong, err.Error())
	}
	return f
}
