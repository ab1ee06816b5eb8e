package metadata

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"varve.dev/durable"
	"varve.dev/layout"
)

// How the change log is written anew.

// logChunk is how many records share a line of the log's beginning.
const logChunk = 500

// writeLog writes the log anew from the database and lets it follow it.
func (db *DB) writeLog() error {
	last, err := db.newLog()
	if err != nil {
		return err
	}
	f, err := db.root.AppendFile(layout.LogFile, 0o600)
	if err != nil {
		return err
	}
	db.log.begin(f, last)
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
	l := db.log
	l.syncing.Lock()
	defer l.syncing.Unlock()
	last, err := db.newLog()
	if err != nil {
		return err // the old one stands
	}
	f, err := db.root.AppendFile(layout.LogFile, 0o600)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.failed = true // what would be written now has no name any more
		return err
	}
	_ = l.file.Close()
	l.file, l.last, l.synced, l.failed = f, last, last, false
	return nil
}

// newLog puts a log that it writes from the database, under another name first,
// in the place of what is there. No commit may take place meanwhile.
func (db *DB) newLog() (last uint64, err error) {
	const name = durable.TempPrefix + layout.LogFile
	// The first line says how long the beginning is.
	var size counter
	if _, err = db.dump(&size, 0); err == nil {
		last, err = db.writeBeginning(name, int64(size))
	}
	if err == nil {
		err = db.root.Replace(name, layout.LogFile)
	}
	if err != nil {
		return 0, fmt.Errorf("write the log anew: %w", err)
	}
	return last, nil
}

// writeBeginning makes the file name, in place of what a crash has left of an
// earlier try, and syncs it.
func (db *DB) writeBeginning(name string, size int64) (last uint64, err error) {
	f, err := db.root.AppendFile(name, 0o600)
	if err != nil {
		return 0, err
	}
	if err = f.Truncate(0); err == nil {
		last, err = db.dump(f, size)
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
func (db *DB) dump(w io.Writer, base int64) (last uint64, err error) {
	err = db.View(context.Background(), func(tx *Tx) error {
		if last, err = tx.lastChange(); err != nil {
			return err
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
			return err
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
				return err
			}
		}
		return flush(layout.ChangeRecord{})
	})
	return last, err
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
