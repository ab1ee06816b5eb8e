package metadata

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"varve.dev/errdefs"
)

// A database that is open is read in full now and then: damage in pages that
// nobody asks for, and entries that are missing, show in no other way.

const (
	// watchAfter is when a database is read in full that was too large for
	// it when it was opened: most commands are done by then.
	watchAfter = 30 * time.Second
	// watchEvery is how often any database is, while it stays open.
	watchEvery = 24 * time.Hour
	// watchPace is the time for a byte of it: 64 MB in a second. Pages that
	// commits free meanwhile cannot be used again before it is over.
	watchPace = 15 * time.Nanosecond
	watchNap  = 10 * time.Millisecond
)

// firstWatch is how long watch waits, by what opening has read.
func (db *DB) firstWatch(all bool) time.Duration {
	if fi, err := db.h.file.Stat(); err == nil && !all && fi.Size() > maxPagesRead*int64(os.Getpagesize()) {
		return watchAfter
	}
	return watchEvery
}

// watch reads the whole database now and then while it is open, until it finds
// damage.
func (db *DB) watch(first time.Duration) {
	for wait := first; ; wait = watchEvery {
		if db.pause(wait) != nil || db.checkOpen(db.pace()) != nil {
			return
		}
	}
}

// errWatchEnds ends a check of a database that is being closed.
var errWatchEnds = fmt.Errorf("the database is being closed: %w", errdefs.ErrUnavailable)

// pause waits, unless the database is being closed.
func (db *DB) pause(d time.Duration) error {
	select {
	case <-db.closing:
		return errWatchEnds
	default:
	}
	if d == 0 {
		return nil
	}
	select {
	case <-db.closing:
		return errWatchEnds
	case <-time.After(d):
		return nil
	}
}

// pace keeps a check to watchPace.
func (db *DB) pace() func(bytes int) error {
	began, read := time.Now(), 0
	return func(n int) error {
		read += n
		nap := time.Duration(read)*watchPace - time.Since(began)
		if nap < watchNap {
			nap = 0
		}
		return db.pause(nap)
	}
}

// Check reads everything that the open database holds, past bbolt: from the
// file, one page after the other, so that damage ends in an error and nothing
// worse. Errors: Corrupt (M1, M2, M5), and whoever waits for [DB.Damaged] is
// told; the end of ctx.
func (db *DB) Check(ctx context.Context) error {
	return db.checkOpen(func(int) error { return ctx.Err() })
}

func (db *DB) checkOpen(pace func(bytes int) error) error {
	return db.View(context.Background(), func(tx *Tx) error {
		c := &pageChecker{file: tx.h.file, pageSize: uint64(tx.h.bolt.Info().PageSize), leaves: true, pace: pace}
		c.setHigh(uint64(tx.bolt.Size()) / c.pageSize)
		freelist, err := c.freelistOf(uint64(tx.bolt.ID()))
		if err == nil && freelist != noFreelist {
			err = c.checkFreelist(freelist)
		}
		if err == nil {
			err = c.checkRoot(uint64(tx.bolt.Cursor().Bucket().Root()))
		}
		return damaged(db.path, err)
	})
}

// freelistOf returns where the free list of a commit stands, noFreelist if two
// more have been made since.
func (c *pageChecker) freelistOf(commit uint64) (uint64, error) {
	for try := 0; ; try++ {
		first, ok := c.readMeta(0)
		second, ok2 := c.readMeta(c.pageSize)
		switch {
		case ok && ok2 && first.txid == commit:
			return first.freelist, nil
		case ok && ok2 && second.txid == commit:
			return second.freelist, nil
		case ok && ok2:
			return noFreelist, nil
		case try == 3: // one that is being written has had the time
			return 0, errors.New("a meta page is not valid")
		}
		time.Sleep(time.Millisecond)
	}
}
