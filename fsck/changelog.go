package fsck

import (
	"bufio"
	"errors"
	"io"
	"io/fs"
	"strings"

	bolt "go.etcd.io/bbolt"

	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

// readLogged takes down what the change log has to give.
func readLogged(tx *bolt.Tx, rec *records) {
	for _, name := range layout.LoggedBuckets() {
		b := tx.Bucket([]byte(name))
		if b == nil {
			continue
		}
		_ = b.ForEach(func(k, v []byte) error {
			value := "true"
			if name != layout.BucketEdges {
				value = string(layout.Body(v))
			} else if e, err := layout.ParseEdge(k); err != nil || !layout.LoggedEdge(e) {
				return nil
			}
			rec.logged[name+"\x00"+string(k)] = value
			return nil
		})
	}
}

// changeLog: M4.
func (c *checker) changeLog(f found) {
	if c.rec == nil {
		return // M2
	}
	said := map[string]string{}
	seq, ok := c.replay(said, f)
	if !ok {
		return
	}
	for seq < c.rec.seq {
		seq++
		change, ok := c.rec.tail[layout.TailKey(seq)]
		if !ok {
			f("change log", layout.LogFile, "change %d is neither there nor in the database", seq)
			return
		}
		apply(said, change)
	}
	for key, value := range c.rec.logged {
		if bucket, name, _ := strings.Cut(key, "\x00"); c.rec.unreadable[bucket+"/"+name] {
			delete(said, key)
			continue // M1
		}
		if got, ok := said[key]; !ok {
			f("change log", layout.LogFile, "it has no %q", key)
		} else if got != value {
			f("change log", layout.LogFile, "it says of %q: %.200s", key, got)
		}
	}
	for key := range said {
		if _, ok := c.rec.logged[key]; !ok {
			f("change log", layout.LogFile, "it has %q, which the database has not", key)
		}
	}
}

// replay reads the log as far as the database had got when it was read, up to
// a last line that is not whole.
func (c *checker) replay(said map[string]string, f found) (seq uint64, ok bool) {
	file, err := reach.Regular(c.fd(), layout.LogFile)
	if errors.Is(err, fs.ErrNotExist) {
		f("change log", layout.LogFile, "it is missing")
		return 0, false
	}
	if err != nil {
		f("change log", layout.LogFile, "%v", err)
		return 0, false
	}
	defer file.Close()
	lines := bufio.NewReader(file)
	for n := 1; ; n++ {
		line, err := layout.ReadLine(lines)
		if errors.Is(err, io.EOF) {
			return seq, true // the end, or a line being written
		}
		if err != nil {
			f("change log", layout.LogFile, "line %d: %v", n, err)
			return 0, false
		}
		change, err := layout.DecodeLine(line)
		switch {
		case err != nil:
			if _, perr := lines.Peek(1); perr != nil {
				return seq, true // torn by a power cut
			}
			f("change log", layout.LogFile, "line %d: %v", n, err)
			return 0, false
		case n == 1 && change.Store != c.rec.store:
			f("change log", layout.LogFile, "it is of store %q, not %q", change.Store, c.rec.store)
			return 0, false
		case n > 1 && change.Seq != seq && change.Seq != seq+1:
			f("change log", layout.LogFile, "line %d has number %d, the one before %d", n, change.Seq, seq)
			return 0, false
		case change.Seq > c.rec.seq:
			if c.opts.DB == nil {
				f("change log", layout.LogFile, "it tells of change %d, the database has got to %d", change.Seq, c.rec.seq)
			}
			return seq, c.opts.DB != nil
		}
		seq = change.Seq
		apply(said, change)
	}
}

func apply(said map[string]string, change layout.ChangeRecord) {
	for _, ch := range change.Changes {
		if key := ch.Bucket + "\x00" + ch.Key; ch.Value == nil {
			delete(said, key)
		} else {
			said[key] = string(ch.Value)
		}
	}
}
