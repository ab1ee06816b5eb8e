package powercut

import (
	"cmp"
	"math/rand/v2"
	"slices"
)

// sortCuts puts cuts in the order in which a [Replay] can make them.
func sortCuts(cuts []Cut) {
	slices.SortStableFunc(cuts, func(a, b Cut) int { return cmp.Compare(a.At, b.At) })
}

// Replay makes crash images of a recording, one cut after the other.
type Replay struct {
	events  []event
	durable *Disk // all events before applied
	applied int
}

// Replay begins at the start of the recording, which has to be complete.
func (r *Recording) Replay() *Replay {
	return &Replay{events: r.events(), durable: r.base.Fork()}
}

// Image returns the disk that the cut leaves. The cuts of one Replay come in
// the order of their moments, and an image is of use until the next.
func (p *Replay) Image(cut Cut) *Disk {
	promised := 0
	for _, e := range p.events[:cut.At] {
		if e.kind == flushed {
			promised = max(promised, e.covers)
		}
	}
	for ; p.applied < promised; p.applied++ {
		if e := p.events[p.applied]; e.kind == wrote {
			p.durable.write(e.data, e.off)
		}
	}
	image := p.durable.Fork()
	rnd := rand.New(rand.NewPCG(cut.Seed, uint64(cut.At)))
	for _, e := range p.events[p.applied:cut.At] {
		if e.kind == wrote && cut.Tail != None {
			tear(image, e, func() bool { return cut.Tail == All || rnd.IntN(2) == 0 })
		}
	}
	return image
}

// tear writes the sectors of e that are kept.
func tear(d *Disk, e event, keep func() bool) {
	data, off := e.data, e.off
	for len(data) > 0 {
		n := min(int64(len(data)), TearSize-off%TearSize)
		if keep() {
			d.write(data[:n], off)
		}
		data, off = data[n:], off+n
	}
}
