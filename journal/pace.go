package journal

import (
	"context"
	"time"
)

// The deleting is paced: it works a share of the time, so that whoever waits for
// the file system waits no longer than usual. Somebody who waits for the space
// makes it hurry.

const (
	// pacedFiles is how many files go between two rests.
	pacedFiles = 32
	// restShare is how many times as long as it works the sweeper rests:
	// docs/design/0008-reclaim.md has what was measured.
	restShare = 4
	// longRest bounds a rest, and with it how long hurry is not heeded.
	longRest = 100 * time.Millisecond
)

// pace is one round's.
type pace struct {
	ctx    context.Context
	j      *Journal
	files  int
	worked time.Time // since when
}

// next is called before each file is deleted. Its error is the end of ctx.
func (p *pace) next() error {
	if p.files++; p.files < pacedFiles {
		return nil
	}
	rest := min(restShare*time.Since(p.worked), longRest)
	p.files = 0
	if p.j.inHurry() {
		rest = 0
	}
	select {
	case <-p.ctx.Done():
		return p.ctx.Err()
	case <-time.After(rest):
	}
	p.worked = time.Now()
	return nil
}

func (j *Journal) inHurry() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.hurried > 0
}
