package metadata

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// How the change log is written anew.

// logChunk is how many records share a line of the log's beginning.
const logChunk = 500

// writeLog writes the log anew from the database and lets it follow it.
func (db *DB) writeLog() error {
	last, base, err := db.newLog()
	if err != nil {
		return err
	}
	f, err := db.root.AppendFile(layout.LogFile, 0o600)
	if err != nil {
		return err
	}
	db.log.begin(f, last, base)
	db.log.synced = last
	return nil
}

// RewriteLog makes the log of an open database give what the database holds,
// whatever it gave before. After nil the new log is durable. Commits wait
// meanwhile: it is for a log that is damaged.
func (db *DB) RewriteLog(ctx context.Context) error {
	if err := db.exchangeLog(); err != nil {
		return err
	}
	// As dropTail: the commit takes out of the database what the log has.
	return db.Update(ctx, func(*Tx) error { return nil })
}

func (db *DB) exchangeLog() error {
	db.committing.Lock()
	defer db.committing.Unlock()
	db.log.syncing.Lock()
	defer db.log.syncing.Unlock()
	last, base, err := db.newLog()
	if err != nil {
		return err // the old one stands
	}
	return db.useNewLog(last, base)
}

// useNewLog lets the log that has the name now follow the database, in place of
// the one that had it. The caller holds committing and syncing.
func (db *DB) useNewLog(last uint64, base int64) error {
	l := db.log
	f, err := db.root.AppendFile(layout.LogFile, 0o600)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.failed = true // what would be written now has no name any more
		return err
	}
	_ = l.file.Close()
	l.file, l.last, l.synced, l.failed, l.base = f, last, last, false, base
	return nil
}

// LogWorthCompacting tells whether the log has become so long beside its beginning
// that the next opening would write it anew.
func (db *DB) LogWorthCompacting() bool {
	l := db.log
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.failed && l.file.Size() > logLimit(l.base)
}

// CompactLog writes the log anew while the database is in use. Commits wait only
// while what they have added meanwhile is copied. After nil the new log is
// durable; after an error the old one goes on.
func (db *DB) CompactLog(ctx context.Context) error {
	end, err := db.beginCompacting()
	if err != nil {
		return err
	}
	defer end()
	const name = durable.TempPrefix + layout.LogFile
	of, base, err := db.writeAside(ctx, name)
	if err == nil {
		err = db.putLog(name, of, base)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write the log anew: %w", err), db.root.Remove(name))
	}
	return nil
}

// logPlace is how long a log was at some moment.
type logPlace struct {
	file *durable.File
	at   int64
}

// writeAside writes what the database holds at one moment as the beginning of a
// log, and returns how long the log was then.
func (db *DB) writeAside(ctx context.Context, name string) (of logPlace, base int64, err error) {
	db.committing.Lock()
	of = logPlace{db.log.file, db.log.file.Size()}
	h, leave := db.enter()
	tx, err := h.bolt.Begin(false)
	db.committing.Unlock()
	defer leave()
	if err != nil {
		return of, 0, err
	}
	defer func() { _ = tx.Rollback() }()
	defer faulting()()
	var size counter
	err = protect(func() error {
		view := &Tx{bolt: tx, h: h}
		if _, err := db.dump(view, &size, 0); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		_, err := db.writeBeginning(view, name, int64(size))
		return err
	})
	return of, int64(size), db.suspect(h, err)
}

// putLog adds to a log that begins with an earlier state what was added to the
// old one since, and puts it in that one's place.
func (db *DB) putLog(name string, of logPlace, base int64) error {
	db.committing.Lock()
	defer db.committing.Unlock()
	l := db.log
	l.syncing.Lock()
	defer l.syncing.Unlock()
	if err := errors.Join(db.root.Poisoned(), db.damage.get()); err != nil {
		return err
	}
	if l.file != of.file { // see RewriteLog
		return fmt.Errorf("the old one has been written anew: %w", errdefs.ErrUnavailable)
	}
	if !l.complete() {
		return fmt.Errorf("a line of the old one is missing: %w", errdefs.ErrUnavailable)
	}
	f, err := db.root.AppendFile(name, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, io.NewSectionReader(l.file, of.at, l.file.Size()-of.at))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := db.root.Replace(name, layout.LogFile); err != nil {
		return err
	}
	return db.useNewLog(l.last, base)
}

// newLog puts a log that it writes from the database, under another name first,
// in the place of what is there. No commit may take place meanwhile.
func (db *DB) newLog() (last uint64, base int64, err error) {
	const name = durable.TempPrefix + layout.LogFile
	// The first line says how long the beginning is.
	var size counter
	err = db.View(context.Background(), func(tx *Tx) error {
		if _, err := db.dump(tx, &size, 0); err != nil {
			return err
		}
		last, err = db.writeBeginning(tx, name, int64(size))
		return err
	})
	if err == nil {
		err = db.root.Replace(name, layout.LogFile)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("write the log anew: %w", err)
	}
	return last, int64(size), nil
}

// writeBeginning makes the file name, in place of what a crash has left of an
// earlier try, and syncs it.
func (db *DB) writeBeginning(tx *Tx, name string, size int64) (last uint64, err error) {
	f, err := db.root.AppendFile(name, 0o600)
	if err != nil {
		return 0, err
	}
	if err = f.Truncate(0); err == nil {
		last, err = db.dump(tx, f, size)
	}
	if err == nil {
		err = f.Sync()
	}
	return last, errors.Join(err, f.Close())
}

// counter counts what is written to it.
type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// dump writes everything that is logged as the beginning of a log.
func (db *DB) dump(tx *Tx, w io.Writer, base int64) (last uint64, err error) {
	if last, err = tx.lastChange(); err != nil {
		return 0, err
	}
	var chunk []layout.Change
	flush := func(c layout.ChangeRecord) error {
		c.Seq, c.Changes = last, chunk
		chunk = nil
		line, err := layout.EncodeLine(c)
		if err != nil {
			return err
		}
		_, err = w.Write(line)
		return err
	}
	if err := flush(layout.ChangeRecord{Store: db.meta.ID, Base: uint64(base)}); err != nil {
		return last, err
	}
	for _, bucket := range logged {
		err := tx.bolt.Bucket([]byte(bucket)).ForEach(func(k, v []byte) error {
			change, ok, err := changeOf(bucket, k, v)
			if err != nil || !ok {
				return err
			}
			if chunk = append(chunk, change); len(chunk) == logChunk {
				return flush(layout.ChangeRecord{})
			}
			return nil
		})
		if err != nil {
			return last, err
		}
	}
	return last, flush(layout.ChangeRecord{})
}

// changeOf is a stored record as a change, and whether it is logged.
func changeOf(bucket string, k, v []byte) (layout.Change, bool, error) {
	if bucket != layout.BucketEdges {
		var body json.RawMessage
		err := layout.Decode(bucket, string(k), v, &body)
		return layout.Change{Bucket: bucket, Key: string(k), Value: body}, true, err
	}
	e, err := layout.ParseEdge(k)
	return layout.Change{Bucket: bucket, Key: string(k), Value: edgeThere}, err == nil && layout.LoggedEdge(e), err
}
