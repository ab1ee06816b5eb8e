package metadata

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// The change log is the database's second life: see layout.ChangeRecord.

// logSync is how long a line may wait for its sync.
const logSync = time.Second

// changeLog writes the lines of one open database.
type changeLog struct {
	syncing sync.Mutex // held for a sync, and while the file is exchanged

	mu     sync.Mutex // guards the rest
	file   *durable.File
	last   uint64 // number of the last line in the file
	synced uint64 // number of the last line that is durable
	failed bool   // a line is missing; the next opening writes it from BucketLogTail

	wake chan struct{}
	end  chan struct{}
	done sync.WaitGroup
}

// edgeThere is the value of an edge in the log.
var edgeThere = []byte("true")

// note takes a change down for the log.
func (tx *Tx) note(bucket, key string, value []byte) {
	if tx.changes == nil || !slices.Contains(logged, bucket) {
		return
	}
	*tx.changes = append(*tx.changes, layout.Change{Bucket: bucket, Key: key, Value: value})
}

var logged = layout.LoggedBuckets()

func (tx *Tx) noteEdge(e layout.Edge, value []byte) {
	if layout.LoggedEdge(e) {
		tx.note(layout.BucketEdges, string(e.Key()), value)
	}
}

// stage ends a transaction. It gives the changes their number and puts them
// where the next opening finds them if they do not get into the file. It
// returns their line, nil if there is nothing to tell.
func (l *changeLog) stage(tx *Tx) (line []byte, err error) {
	tail := tx.bolt.Bucket([]byte(layout.BucketLogTail))
	l.mu.Lock()
	synced := l.synced
	l.mu.Unlock()
	c := tail.Cursor()
	for k, _ := c.First(); k != nil && string(k) <= layout.TailKey(synced); k, _ = c.First() {
		if err := remove(tail, k); err != nil {
			return nil, err
		}
	}
	last, err := tx.lastChange()
	if err == nil && len(*tx.changes) > 0 {
		last++
		rec := layout.ChangeRecord{Seq: last, Changes: *tx.changes}
		if err = table[string, layout.ChangeRecord](tx, layout.BucketLogTail).Put(layout.TailKey(last), rec); err == nil {
			line, err = layout.EncodeLine(rec)
		}
	}
	if err != nil {
		return nil, err
	}
	return line, tx.mark(last)
}

func (tx *Tx) lastChange() (uint64, error) {
	s, err := tx.states().Get(layout.StateKey)
	return s.Change, err
}

// mark writes the state record of a transaction that commits.
func (tx *Tx) mark(change uint64) error {
	return tx.states().Put(layout.StateKey, layout.StateRecord{Commit: uint64(tx.bolt.ID()), Change: change})
}

// append writes a line whose commit is durable. What goes wrong with it is no
// error of the commit: the line stands in the database too.
func (l *changeLog) append(line []byte) {
	if line == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed {
		return
	}
	if _, err := l.file.Write(line); err != nil {
		l.failed = true
		return
	}
	l.last++
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// syncLoop makes lines durable, many at once.
func (l *changeLog) syncLoop() {
	defer l.done.Done()
	for {
		select {
		case <-l.wake:
		case <-l.end:
			return
		}
		select {
		case <-time.After(logSync):
		case <-l.end:
			return
		}
		_ = l.sync()
	}
}

func (l *changeLog) sync() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	l.mu.Lock()
	file, last := l.file, l.last
	l.mu.Unlock()
	if err := file.Sync(); err != nil {
		return err
	}
	l.mu.Lock()
	l.synced = max(l.synced, last)
	l.mu.Unlock()
	return nil
}

// close ends the log. What is not synced by then is in the database.
func (l *changeLog) close() error {
	close(l.end)
	l.done.Wait()
	return l.file.Close()
}

// begin lets the log follow the database from now on.
func (l *changeLog) begin(file *durable.File, last uint64) {
	l.file, l.last = file, last
	l.wake, l.end = make(chan struct{}, 1), make(chan struct{})
	l.done.Add(1)
	go l.syncLoop()
}

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
			db.log.begin(f, want)
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
		db.log.begin(f, end.seq)
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
