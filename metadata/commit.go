package metadata

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// update is one caller's wish in the queue of the commit loop.
type update struct {
	fn   func(*Tx) error // nil: only the turn
	err  error
	done chan struct{}
}

// maxGroup bounds the updates of one commit, and with them its dirty pages.
const maxGroup = 256

// Update runs fn in a read-write transaction. After nil its changes are
// durable; after an error of fn none of them took place. fn may run more than
// once, when another update of the same commit failed: it must not keep what
// it computed in an earlier run, and does no I/O. ctx is looked at before the
// update is queued, not after: from then on it is carried out.
func (db *DB) Update(ctx context.Context, fn func(*Tx) error) error {
	return db.inTurn(ctx, fn)
}

// Settle returns nil when everything that a View has shown is durable: a commit
// shows before its last sync is done. It is for whoever acknowledges something
// because it is there already.
func (db *DB) Settle(ctx context.Context) error { return db.inTurn(ctx, nil) }

// inTurn waits for the commit with fn, or for nil, of all before it.
func (db *DB) inTurn(ctx context.Context, fn func(*Tx) error) error {
	if err := db.broken.get(); err != nil {
		return err
	}
	if err := db.root.Poisoned(); err != nil {
		return err
	}
	u := &update{fn: fn, done: make(chan struct{})}
	select {
	case db.queue <- u:
	case <-ctx.Done():
		return ctx.Err()
	case <-db.closing:
		return errClosed
	case <-db.broken.came:
		return db.broken.get()
	}
	select {
	case <-u.done:
		return u.err
	case <-db.broken.came:
	}
	// The loop may answer, or wait for ever in bbolt. Then nobody knows what
	// became of the update.
	select {
	case <-u.done:
		return u.err
	case <-time.After(brokenWait):
		return db.commitFailed(db.broken.get())
	}
}

// commitLoop is the only writer. While it commits one group the next gathers.
func (db *DB) commitLoop() {
	defer faulting()()
	for {
		select {
		case first := <-db.queue:
			db.commitGroup(db.gather(first))
		case <-db.closing:
			return
		}
	}
}

func (db *DB) gather(first *update) []*update {
	group := []*update{first}
	for len(group) < maxGroup {
		select {
		case u := <-db.queue:
			group = append(group, u)
		default:
			return group
		}
	}
	return group
}

// commitGroup commits what it can of the group, and answers everybody.
func (db *DB) commitGroup(group []*update) {
	for len(group) > 0 {
		failed, err := db.tryCommit(group)
		if failed < 0 {
			for _, u := range group {
				u.err = err
				close(u.done)
			}
			return
		}
		// One of them failed by itself; the others have not happened
		// yet and are tried again without it.
		group[failed].err = err
		close(group[failed].done)
		group = append(group[:failed:failed], group[failed+1:]...)
	}
}

// tryCommit runs all of the group in one transaction. It returns the index of
// an update that failed, or -1 and what became of all of them.
func (db *DB) tryCommit(group []*update) (failed int, err error) {
	failed = -1
	if !slices.ContainsFunc(group, func(u *update) bool { return u.fn != nil }) {
		return failed, nil
	}
	db.committing.Lock()
	defer db.committing.Unlock()
	var line []byte
	var number uint64
	var accounts layout.Accounts
	var trashed int64
	h := db.h // nobody exchanges it meanwhile
	err = db.guard(func() error {
		return h.bolt.Update(func(btx *bolt.Tx) error {
			// A write transaction has the number of its commit.
			if err := notBefore(btx, h.committed.Load()+1); err != nil {
				return err
			}
			tx := &Tx{bolt: btx, h: h, changes: new([]layout.Change), touched: db.touched}
			for i, u := range group {
				if u.fn == nil {
					continue
				}
				if err := protect(func() error { return u.fn(tx) }); err != nil {
					failed = i
					return err
				}
			}
			var err error
			line, err = db.log.stage(tx)
			number, accounts, trashed = uint64(btx.ID()), tx.accounts, tx.trashed
			return err
		})
	})
	_ = db.suspect(h, err)
	if err != nil && (failed < 0 || db.broken.get() != nil) {
		return -1, db.commitFailed(err)
	}
	if err == nil {
		h.committed.Store(number)
		db.accounts.Store(&accounts)
		db.trashed.Add(trashed)
		db.commits.add(len(group))
		db.log.append(line)
	}
	return failed, err
}

// commitFailed decides what a commit that did not succeed means. A page that
// could not be written for want of space was not yet part of anything, and the
// next commit may succeed. After anything else, a failed sync above all, nobody
// knows what the disk holds.
func (db *DB) commitFailed(err error) error {
	if noSpace(err) {
		return fmt.Errorf("commit to %s: %w: %w", db.path, bare(err), errdefs.ErrResourceExhausted)
	}
	db.doubt.Store(true)
	db.root.Poison(fmt.Errorf("commit to %s: %w", db.path, bare(err)))
	if errdefs.AsCorrupt(err) != nil {
		return err
	}
	return db.root.Poisoned()
}

// bare takes the file's name off an error of bbolt: its file has the name that
// it was made under.
func bare(err error) error {
	var call *fs.PathError
	if errors.As(err, &call) {
		return fmt.Errorf("%s: %w", call.Op, call.Err)
	}
	return err
}

// noSpace tells whether a write or a change of length found the disk full. The
// same error from a sync is another matter: what it could not write is lost,
// and bbolt hands it on without the name of a call around it.
func noSpace(err error) bool {
	// bbolt keeps only the text of a failure to grow its file. Nothing has
	// been written by then.
	if err != nil && strings.HasPrefix(err.Error(), "file resize error:") {
		return true
	}
	var call *fs.PathError
	return errors.As(err, &call) && call.Op != "sync" &&
		(errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT))
}

// commitCounter counts for benchmarks: they explain times by commits.
type commitCounter struct{ commits, updates atomic.Int64 }

func (c *commitCounter) add(updates int) {
	c.commits.Add(1)
	c.updates.Add(int64(updates))
}

// Commits returns how many transactions were committed since Open, and how
// many updates they carried.
func (db *DB) Commits() (commits, updates int64) {
	return db.commits.commits.Load(), db.commits.updates.Load()
}
