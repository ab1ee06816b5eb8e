package metadata

import (
	"slices"
	"sync"
	"time"

	"varve.dev/durable"
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
	base   int64  // bytes of its beginning; see logLimit
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
		if err := tx.remove(layout.BucketLogTail, k); err != nil {
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
	accounts, err := tx.Accounts()
	if err != nil {
		return err
	}
	return tx.states().Put(layout.StateKey, layout.StateRecord{Commit: uint64(tx.bolt.ID()), Change: change, Accounts: accounts})
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

// complete tells whether every line got into the file.
func (l *changeLog) complete() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.failed
}

// close ends the log. What is not synced by then is in the database.
func (l *changeLog) close() error {
	close(l.end)
	l.done.Wait()
	return l.file.Close()
}

// begin lets the log follow the database from now on.
func (l *changeLog) begin(file *durable.File, last uint64, base int64) {
	l.file, l.last, l.base = file, last, base
	l.wake, l.end = make(chan struct{}, 1), make(chan struct{})
	l.done.Add(1)
	go l.syncLoop()
}
