package crashtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/internal/powercut"
	"varve.dev/internal/testkit"
)

// longName is an image of three large layers.
const longName = "long:1"

const (
	longLayers = 3
	longLayer  = 200 << 20 // bytes
)

// resumeLoss is what a power cut may take of a download: what docs/CRASH.md
// promises, and what was on its way to the disk.
const resumeLoss = 256<<20 + 16<<20

// pullLong pulls the long image and tells how much of it is there.
func pullLong(dir string, args []string, mark func(string, ...any)) error {
	ctx := context.Background()
	e, err := daemon.Open(ctx, daemon.Options{Root: dir, State: args[0]})
	if err != nil {
		return err
	}
	var mu sync.Mutex
	have, told := map[string]int64{}, int64(0)
	progress := func(ev varve.Event) {
		mu.Lock()
		defer mu.Unlock()
		if ev.Phase == varve.Downloading {
			have[ev.ID] = max(have[ev.ID], ev.Current)
		}
		sum := int64(0)
		for _, n := range have {
			sum += n
		}
		if sum-told >= 16<<20 {
			told = sum
			mark("received %d", sum)
		}
	}
	w := &work{Engine: e, remote: args[1], mark: mark}
	err = w.change("+"+longName, func() error {
		_, err := e.Pull(ctx, varve.PullRequest{Reference: w.remote + "/" + longName, Registry: varve.Registry{PlainHTTP: true}}, progress)
		return err
	})
	return errors.Join(err, e.Close(ctx))
}

// pullRest pulls what is missing of the long image, and tells how much that is.
func pullRest(dir string, args []string, mark func(string, ...any)) error {
	ctx := context.Background()
	e, err := daemon.Open(ctx, daemon.Options{Root: dir, State: args[0]})
	if err != nil {
		return err
	}
	w := &work{Engine: e, remote: args[1], mark: mark}
	return errors.Join(w.fetched(ctx, func(through *work) step { return through.pull(longName) }), e.Close(ctx))
}

var longPullTable = table{"long pulls", row{"file system", "image", "power cuts while it is pulled", "received by then", "of that fetched again"}}

// TestPowerCutInALongPull cuts the power in the middle of a long download. The
// next pull goes on where the last checkpoint was.
func TestPowerCutInALongPull(t *testing.T) {
	if caseCount(t, 0) == 0 {
		t.Skip("it takes minutes: make powercut")
	}
	at := newPlace(t, 1, 1)
	at.registry.Push(t, testkit.Long(t, longLayers, longLayer), longName)
	for _, kind := range kinds(t) {
		t.Run(string(kind), func(t *testing.T) {
			rig := newRig(t)
			rec, _ := record(t, rig, kind, 4<<30, at.worker("long pull"), at.state, at.remote)
			images := rec.Replay()
			const cuts = 6
			var received, lost []string
			for i := range cuts {
				// From the middle on there is something to lose.
				most := longLayers * longLayer / 2 * (cuts + i) / cuts
				n, cutAt := lastReceived(rec, int64(most))
				cut := powercut.Cut{At: cutAt, Tail: []powercut.Tail{powercut.None, powercut.Some}[i%2], Seed: uint64(i)}
				m, err := rig.Mount(kind, images.Image(cut))
				must(t, err)
				fetched := int64(-1)
				w := at.worker("pull rest")
				w.Mark = func(line string) {
					if s, ok := strings.CutPrefix(line, "fetched "); ok {
						fetched, _ = strconv.ParseInt(s, 10, 64)
					}
				}
				must(t, w.Run(m.Dir, at.state, at.remote))
				must(t, m.Unmount())
				again := max(0, fetched-(longLayers*longLayer-n))
				received, lost = append(received, fmt.Sprint(n>>20)), append(lost, fmt.Sprint(again>>20))
				if again > resumeLoss {
					t.Errorf("%s: %d MiB of %d MiB were fetched again", cut, again>>20, n>>20)
				}
			}
			tell(t, longPullTable, row{string(kind), fmt.Sprintf("%d layers of %d MiB", longLayers, longLayer>>20), fmt.Sprint(cuts),
				strings.Join(received, ", ") + " MiB", strings.Join(lost, ", ") + " MiB"})
		})
	}
}

// lastReceived returns the last moment at which at most so much was received.
func lastReceived(rec *powercut.Recording, most int64) (received int64, at int) {
	for _, m := range slices.Backward(rec.Marks(rec.Len())) {
		s, ok := strings.CutPrefix(m, "received ")
		if n, err := strconv.ParseInt(s, 10, 64); ok && err == nil && n <= most {
			return n, rec.Find(m)
		}
	}
	return 0, rec.Len()
}
