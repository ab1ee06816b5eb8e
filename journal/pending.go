package journal

import (
	"context"
	"fmt"
	"maps"

	"varve.dev/layout"
)

// pend remembers an intent that could not be carried out, on a full disk for
// one. Until it is, its files are nobody else's.
func (j *Journal) pend(id layout.IntentID, in layout.IntentRecord) {
	j.mu.Lock()
	j.pending[id] = in
	j.mu.Unlock()
	j.Kick()
}

func (j *Journal) pendingNow() map[layout.IntentID]layout.IntentRecord {
	j.mu.Lock()
	defer j.mu.Unlock()
	return maps.Clone(j.pending)
}

// FinishPending carries out what publications of this process have recorded
// and not finished. The sweeper does so each time that it wakes; whoever is
// about to touch a file that one of them may name does it first.
func (j *Journal) FinishPending(ctx context.Context) error {
	if len(j.pendingNow()) == 0 {
		return nil
	}
	// One at a time: an intent that is carried out again later would bring
	// back what was removed meanwhile.
	select {
	case j.finishing <- struct{}{}:
		defer func() { <-j.finishing }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for id, in := range j.pendingNow() {
		if err := j.carryOut(id, in); err != nil {
			return fmt.Errorf("finish publication (%s): %w", in.Purpose, err)
		}
		j.mu.Lock()
		delete(j.pending, id)
		j.mu.Unlock()
	}
	return nil
}
