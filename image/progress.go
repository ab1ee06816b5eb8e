package image

import (
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Phase is what happens to a blob at the moment.
type Phase string

// The phases. A layer that is there already goes to Exists at once; the others
// pass through Waiting, Downloading and Unpacking, the latter two side by
// side, to Done. Uploads go from Waiting over Uploading to Done or Exists.
const (
	Waiting     Phase = "waiting"
	Downloading Phase = "downloading"
	Unpacking   Phase = "unpacking"
	Uploading   Phase = "uploading"
	Exists      Phase = "exists"
	Done        Phase = "done"
)

// Event is one step of progress for one blob.
type Event struct {
	Blob  digest.Digest
	Phase Phase
	// Bytes of Total are through this phase. For Unpacking both count
	// compressed bytes.
	Bytes, Total int64
	// MountedFrom is the repository that a pushed blob was taken from
	// without sending it, with Phase Exists.
	MountedFrom string
}

// Progress takes events. It is called from several goroutines and has to
// return at once. Byte counts come at most ten times a second for a blob.
type Progress func(Event)

const progressInterval = 100 * time.Millisecond

// meter counts one blob's bytes in one phase.
type meter struct {
	report Progress
	event  Event

	mu   sync.Mutex
	last time.Time
}

func (p Progress) meter(d digest.Digest, phase Phase, from, total int64) *meter {
	m := &meter{report: p, event: Event{Blob: d, Phase: phase, Bytes: from, Total: total}}
	p.send(m.event)
	return m
}

func (p Progress) send(e Event) {
	if p != nil {
		p(e)
	}
}

func (m *meter) add(n int64) {
	if m.report == nil {
		return
	}
	m.mu.Lock()
	m.event.Bytes += n
	now := time.Now()
	due := now.Sub(m.last) >= progressInterval
	if due {
		m.last = now
	}
	event := m.event
	m.mu.Unlock()
	if due {
		m.report(event)
	}
}
