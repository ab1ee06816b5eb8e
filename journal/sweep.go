package journal

import (
	"context"
	"errors"
	"fmt"
	"path"
	"sync"
	"time"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// sweepBatch is how many removals share the transactions of one round.
const sweepBatch = 256

// retrySweep is the pause after a round that failed.
const retrySweep = 5 * time.Second

// Kick wakes the sweeper: there may be something to delete.
func (j *Journal) Kick() {
	j.mu.Lock()
	j.idle = false
	j.mu.Unlock()
	select {
	case j.kick <- struct{}{}:
	default:
	}
}

// Hurry has everything deleted as fast as it goes, until release is called.
func (j *Journal) Hurry() (release func()) {
	hurry := func(n int) {
		j.mu.Lock()
		defer j.mu.Unlock()
		j.hurried += n
	}
	hurry(1)
	return sync.OnceFunc(func() { hurry(-1) })
}

// Drain waits until everything that was removed before the call is deleted,
// the deleting fails, or ctx ends. What is left is deleted later, by the store's
// next owner if not by this one.
func (j *Journal) Drain(ctx context.Context) error {
	// The channel first: the round that the kick brings may end at once, and
	// of a poisoned store it is the last.
	round := j.sweepRound()
	j.Kick()
	for ours := false; ; ours = true {
		select {
		case <-round:
		case <-ctx.Done():
			return ctx.Err()
		}
		j.mu.Lock()
		idle, err := j.idle, j.sweepErr
		round = j.swept
		j.mu.Unlock()
		switch {
		case idle:
			return nil
		case err != nil && ours:
			return fmt.Errorf("delete what was removed: %w", err)
		case err != nil:
			j.Kick() // that round may have begun before the call
		}
	}
}

// sweepRound returns a channel that closes when the sweeper has ended a round
// that began after the call, or the one under way.
func (j *Journal) sweepRound() <-chan struct{} {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.swept
}

// nextMove returns a channel that closes when files have been moved to the trash
// after the call, or a round has ended.
func (j *Journal) nextMove() <-chan struct{} {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.moved
}

func (j *Journal) sweepLoop(ctx context.Context) {
	defer j.stopped.Done()
	for {
		select {
		case <-ctx.Done():
			return
		case <-j.kick:
		}
		for more := true; more && ctx.Err() == nil; {
			n, err := j.sweepSome(ctx)
			more = n > 0 && err == nil
			j.endRound(!more && err == nil, err)
			if err != nil && j.root.Poisoned() == nil {
				time.AfterFunc(retrySweep, j.Kick)
			}
		}
	}
}

func (j *Journal) endRound(idle bool, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.sweepErr = err
	// A kick that came during the round wants another one.
	j.idle = idle && len(j.kick) == 0
	close(j.swept)
	j.swept = make(chan struct{})
	j.tellMoved()
}

// tellMoved wakes whoever waits for a name. The caller holds mu.
func (j *Journal) tellMoved() {
	close(j.moved)
	j.moved = make(chan struct{})
}

// namesFreed notes that the files of rows are in the trash, durably.
func (j *Journal) namesFreed(rows map[string]layout.SweepRecord) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for id := range rows {
		j.trashed[id] = true
	}
	j.tellMoved()
}

// rowsGone forgets rows that are no more.
func (j *Journal) rowsGone(ids []string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, id := range ids {
		delete(j.trashed, id)
	}
}

// inTrash tells whether the files of a claimed sweep have left their place.
func (j *Journal) inTrash(id string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.trashed[id]
}

// sweepSome carries out what is pending, and up to sweepBatch removals, and
// returns how many.
func (j *Journal) sweepSome(ctx context.Context) (int, error) {
	if err := j.FinishPending(ctx); err != nil {
		return 0, err
	}
	rows, err := j.claim(ctx)
	if err != nil || len(rows) == 0 {
		return 0, err
	}
	durable.At(layout.PointSweepClaimed)
	if err := j.toTrash(rows); err != nil {
		return 0, err
	}
	j.namesFreed(rows)
	durable.At(layout.PointSweepTrashed)
	var done []string
	for id := range rows {
		if ctx.Err() != nil {
			break
		}
		if err := j.root.RemoveTree(layout.TrashPath(id), func() error { return j.next(ctx) }); err != nil {
			continue // stays in the trash with its row; the next owner tries again
		}
		done = append(done, id)
	}
	durable.At(layout.PointSweepDeleted)
	err = j.db.Update(context.Background(), func(tx *metadata.Tx) error {
		for _, id := range done {
			if err := tx.Sweeps().Delete(id); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		j.rowsGone(done)
	}
	return len(done), err
}

// claim takes the next rows for deletion. A row whose files something names
// again is dropped; so is a damaged one (T2), whose path leads anywhere.
func (j *Journal) claim(ctx context.Context) (map[string]layout.SweepRecord, error) {
	var rows map[string]layout.SweepRecord
	if empty, err := j.nothingToSweep(ctx); empty || err != nil {
		return nil, err
	}
	durable.At(layout.PointSweepRecorded)
	err := j.db.Update(ctx, func(tx *metadata.Tx) error {
		rows = map[string]layout.SweepRecord{}
		wanted, err := wantedByIntents(tx)
		if err != nil {
			return err
		}
		var drop []string
		stop := errors.New("enough")
		err = tx.Sweeps().Each("", func(id string, s layout.SweepRecord) error {
			if tx.Exists(s.Node) || !s.Claimed && wanted[s.Node] || s.Path != layout.NodePath(s.Node) {
				drop = append(drop, id)
				return nil
			}
			rows[id] = s
			if len(rows) == sweepBatch {
				return stop
			}
			return nil
		})
		if err != nil && !errors.Is(err, stop) {
			return err
		}
		for _, id := range drop {
			if err := tx.Sweeps().Delete(id); err != nil {
				return err
			}
		}
		for id, s := range rows {
			s.Claimed = true
			if err := tx.Sweeps().Put(id, s); err != nil {
				return err
			}
		}
		return nil
	})
	return rows, err
}

// nothingToSweep spares an idle store the transaction.
func (j *Journal) nothingToSweep(ctx context.Context) (bool, error) {
	empty := true
	err := j.db.View(ctx, func(tx *metadata.Tx) error {
		empty = tx.Sweeps().Empty()
		return nil
	})
	return empty, err
}

// wantedByIntents names the blobs that open intents are about to record.
func wantedByIntents(tx *metadata.Tx) (map[layout.Node]bool, error) {
	wanted := map[layout.Node]bool{}
	err := tx.Intents().Each("", func(_ layout.IntentID, in layout.IntentRecord) error {
		for _, m := range in.Blobs {
			wanted[layout.BlobNode(m.Digest)] = true
		}
		return nil
	})
	return wanted, err
}

// Trash moves a directory to the trash that nothing refers to and that others may
// make again under its name: after nil, or an error without [ErrIntended], its
// name is free. prepare is part of the transaction that records the removal, and
// says what it takes of the disk. The caller keeps others from using the name
// meanwhile.
func (j *Journal) Trash(ctx context.Context, n layout.Node, prepare func(*metadata.Tx) (layout.Usage, error)) error {
	rows := map[string]layout.SweepRecord{}
	err := j.db.Update(ctx, func(tx *metadata.Tx) error {
		clear(rows)
		usage, err := prepare(tx)
		if err != nil {
			return err
		}
		id, row, err := tx.SweepNow(n, layout.NodePath(n), usage)
		rows[id] = row
		return err
	})
	if err != nil {
		return fmt.Errorf("remove %s: %w", n, err)
	}
	durable.At(layout.PointCacheMountClaimed)
	if err := j.toTrash(rows); err != nil {
		return fmt.Errorf("remove %s: %w: %w", n, ErrIntended, err)
	}
	j.Kick()
	return nil
}

// toTrash renames the files of claimed rows, and makes that durable.
func (j *Journal) toTrash(rows map[string]layout.SweepRecord) error {
	changed := []string{layout.TrashDir}
	for id, s := range rows {
		if s.Path == layout.TrashPath(id) {
			continue // somebody else has its name
		}
		err := j.root.Rename(s.Path, layout.TrashPath(id))
		if err != nil && !errors.Is(err, errdefs.ErrNotFound) && !errors.Is(err, errdefs.ErrAlreadyExists) {
			return fmt.Errorf("sweep %s: %w", s.Node, err)
		}
		changed = append(changed, path.Dir(s.Path))
	}
	return j.root.SyncNames(unique(changed)...)
}
