package metadata

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// How an opening finds the change log.

// errLogAhead says that the log tells of commits that the database has lost.
var errLogAhead = errors.New("the log tells of later changes: the newest state of the database is lost")

// openLog brings the log up to the database, or writes it anew.
func (db *DB) openLog() error {
	db.log = &changeLog{}
	want, tail, err := db.unlogged()
	if err != nil {
		return err
	}
	if err := setAside(db.root, layout.LogFile); err != nil {
		return err
	}
	f, err := db.root.AppendFile(layout.LogFile, 0o600)
	if err != nil {
		return err
	}
	// Lines that the database still holds may not be durable: a power cut
	// can have torn any of them. They are written once more.
	safe := want
	if len(tail) > 0 {
		safe = slices.Min(slices.Collect(maps.Keys(tail))) - 1
	}
	end, err := findEnd(f, db.meta.ID, safe)
	if err == nil && end.newest > want {
		f.Close()
		return &errdefs.Corrupt{Invariant: "M2", Object: "database " + db.path, Detail: fmt.Sprintf("%v (%d, not %d)", errLogAhead, end.newest, want)}
	}
	if err == nil && end.size <= logLimit(end.base) {
		if err = f.Truncate(end.size); err == nil {
			err = catchUp(f, end.seq, want, tail)
		}
		if err == nil {
			db.log.begin(f, want, end.base)
			if len(tail) > maxTail {
				err = db.log.sync()
			}
			return err
		}
	}
	if !errors.Is(err, errdefs.ErrResourceExhausted) {
		if err = db.writeLog(); err == nil && len(tail) > 0 {
			return db.dropTail()
		}
	}
	if errors.Is(err, errdefs.ErrResourceExhausted) {
		// A full disk is no reason to keep the store closed: what is to be
		// deleted has to be. The tail in the database grows meanwhile.
		db.log.begin(f, end.seq, end.base)
		db.log.failed = true
		return nil
	}
	return errors.Join(err, f.Close())
}

// dropTail takes the lines that the log has durably out of the database, as each
// commit does. Left to the next one, every opening until then would look for the
// line before them, which a log that was written anew has not, and write it once
// more.
func (db *DB) dropTail() error {
	_, err := db.tryCommit([]*update{{fn: func(*Tx) error { return nil }}})
	if errors.Is(err, errdefs.ErrResourceExhausted) {
		return nil // the next commit does it
	}
	return err
}

// logLimit is the size at which a log is written anew that began with base
// bytes.
func logLimit(base int64) int64 { return 3*base + 4<<20 }

// unlogged returns the number of the last change, and the lines that may not be
// in the file.
func (db *DB) unlogged() (last uint64, tail map[uint64]layout.ChangeRecord, err error) {
	tail = map[uint64]layout.ChangeRecord{}
	err = db.View(context.Background(), func(tx *Tx) error {
		if last, err = tx.lastChange(); err != nil {
			return err
		}
		return tx.bolt.Bucket([]byte(layout.BucketLogTail)).ForEach(func(k, v []byte) error {
			var c layout.ChangeRecord
			if err := layout.Decode(layout.BucketLogTail, string(k), v, &c); err != nil {
				return err
			}
			tail[c.Seq] = c
			return nil
		})
	})
	return last, tail, err
}

// catchUp appends the lines that the file lacks.
func catchUp(f *durable.File, have, want uint64, tail map[uint64]layout.ChangeRecord) error {
	for seq := have + 1; seq <= want; seq++ {
		c, ok := tail[seq]
		if !ok {
			return fmt.Errorf("change %d is neither in the log nor in the database: %w", seq, errdefs.ErrDataLoss)
		}
		line, err := layout.EncodeLine(c)
		if err != nil {
			return err
		}
		if _, err := f.Write(line); err != nil {
			return err
		}
	}
	return nil
}

// maxTail is how many lines may wait for their sync when a log is opened:
// commands that live for less than logSync never sync it.
const maxTail = 100

// logEnd is what a log ends with.
type logEnd struct {
	newest uint64 // number of the last whole line
	seq    uint64 // number of the last line that is durable
	size   int64  // up to that one
	base   int64  // of the beginning; see logLimit
}

// findEnd reads the first line of a log and, from its end, up to the line
// number safe or the last one before it. What a power cut tore comes after
// that. Errors: ErrDataLoss, for a log that is not this store's or has no such
// line.
func findEnd(f *durable.File, store string, safe uint64) (end logEnd, err error) {
	head := make([]byte, 256)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return end, fmt.Errorf("log: %w: %w", err, errdefs.ErrUnavailable)
	}
	first, _, _ := bytes.Cut(head[:n], []byte{'\n'})
	c, err := layout.DecodeLine(first)
	if err != nil || c.Store != store {
		return end, fmt.Errorf("log: its first line is not that of store %s: %w", store, errdefs.ErrDataLoss)
	}
	end.base = int64(c.Base)
	for window := int64(64 << 10); window <= maxEnd; window *= 8 {
		from := max(0, f.Size()-window)
		buf := make([]byte, f.Size()-from)
		if _, err := f.ReadAt(buf, from); err != nil && !errors.Is(err, io.EOF) {
			return end, fmt.Errorf("log: %w: %w", err, errdefs.ErrUnavailable)
		}
		// Backwards, line by line.
		for at := bytes.LastIndexByte(buf, '\n'); at >= 0; {
			before := bytes.LastIndexByte(buf[:at], '\n')
			if before < 0 && from > 0 {
				break // it may begin before the window
			}
			if c, err := layout.DecodeLine(buf[before+1 : at]); err == nil {
				end.newest = max(end.newest, c.Seq)
				if c.Seq <= safe {
					end.seq, end.size = c.Seq, from+int64(at)+1
					return end, nil
				}
			}
			at = before
		}
		if from == 0 {
			break
		}
	}
	return end, fmt.Errorf("log: no line is whole: %w", errdefs.ErrDataLoss)
}

// maxEnd is how much of the log's end is read into memory.
const maxEnd = 256 << 20
