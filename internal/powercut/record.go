package powercut

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// TearSize is the unit that a power cut writes or leaves alone, in bytes.
const TearSize = 4096

// Recording is a disk that remembers what was done to it. It begins when
// [Record] is called; what the disk held by then counts as durable.
type Recording struct {
	base *Disk
	disk *Disk

	// FlushTime is added to each flush, for disks that are slower than
	// memory. Set before the disk is in use.
	FlushTime time.Duration

	mu  sync.Mutex
	log []event
}

// event is one write, flush or mark. Events are in the order in which they
// were complete.
type event struct {
	kind   eventKind
	off    int64
	data   []byte
	covers int    // of a flush: how many events were complete when it began
	note   string // of a mark
}

type eventKind uint8

const (
	wrote eventKind = iota
	flushed
	marked
)

// Record makes a recording on top of base, which is not changed.
func Record(base *Disk) *Recording {
	return &Recording{base: base, disk: base.Fork()}
}

func (r *Recording) diskOf() *Disk { return r.disk }

func (r *Recording) write(p []byte, off int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.disk.write(p, off)
	r.log = append(r.log, event{kind: wrote, off: off, data: append([]byte(nil), p...)})
}

func (r *Recording) flush() {
	r.mu.Lock()
	covers := len(r.log)
	r.mu.Unlock()
	time.Sleep(r.FlushTime)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = append(r.log, event{kind: flushed, covers: covers})
}

// Mark notes that something has happened by now: a thing was acknowledged.
func (r *Recording) Mark(note string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = append(r.log, event{kind: marked, note: note})
}

// Len is the number of events so far. A power cut at n comes after the first
// n of them.
func (r *Recording) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.log)
}

// Marks returns the notes of the first n events.
func (r *Recording) Marks(n int) (notes []string) {
	for _, e := range r.events()[:n] {
		if e.kind == marked {
			notes = append(notes, e.note)
		}
	}
	return notes
}

// Find returns the number of events up to the first mark with this note, the
// mark included; 0 if there is none.
func (r *Recording) Find(note string) int {
	return 1 + slices.IndexFunc(r.events(), func(e event) bool { return e.kind == marked && e.note == note })
}

func (r *Recording) events() []event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log
}

// Count says what a recording holds.
type Count struct {
	Writes, Flushes, Marks int
	Bytes                  int64 // written
}

// Count returns what events from up to to are.
func (r *Recording) Count(from, to int) (c Count) {
	for _, e := range r.events()[from:to] {
		switch e.kind {
		case wrote:
			c.Writes++
			c.Bytes += int64(len(e.data))
		case flushed:
			c.Flushes++
		case marked:
			c.Marks++
		}
	}
	return c
}

// Tail says how much of what was not flushed a crash image has.
type Tail string

// The tails.
const (
	None Tail = "none"
	All  Tail = "all"
	Some Tail = "some" // each sector or not, by the seed
)

// Moment says what a power cut comes right after.
type Moment string

// The moments.
const (
	AfterMark  Moment = "mark" // something was just promised
	AfterFlush Moment = "flush"
	AfterWrite Moment = "write"
)

// Cut is one power cut.
type Cut struct {
	At    int // events that were complete
	After Moment
	Tail  Tail
	Seed  uint64 // of Some
}

func (c Cut) String() string {
	s := fmt.Sprintf("event %d, %s of the tail", c.At, c.Tail)
	if c.Tail == Some {
		s += fmt.Sprintf(" by seed %d", c.Seed)
	}
	return s
}

// Choose returns n cuts in their order, as seed has it. A fifth of them come
// right after marks, at which something was just promised, and of few cuts
// half; three quarters of the rest right after flushes; the others in between.
// Each moment comes once before any comes twice, then with another tail.
func (r *Recording) Choose(n int, seed uint64) []Cut {
	rnd := rand.New(rand.NewPCG(seed, 0))
	at := map[Moment][]int{}
	for i, e := range r.events() {
		moment := map[eventKind]Moment{marked: AfterMark, flushed: AfterFlush, wrote: AfterWrite}[e.kind]
		at[moment] = append(at[moment], i+1)
	}
	var cuts []Cut
	take := func(after Moment, n int, tails ...Tail) {
		from := at[after]
		if len(from) == 0 {
			return
		}
		order := rnd.Perm(len(from))
		for i := range n {
			cuts = append(cuts, Cut{At: from[order[i%len(order)]], After: after, Tail: tails[(i+i/len(order))%len(tails)], Seed: rnd.Uint64()})
		}
	}
	marks := max(n/5, min(n/2, len(at[AfterMark])))
	flushes := (n - marks) * 3 / 4
	take(AfterMark, marks, None, Some)
	take(AfterFlush, flushes, None, Some, All)
	take(AfterWrite, n-marks-flushes, Some, None, All)
	sortCuts(cuts)
	return cuts
}
