package corrupt

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"strconv"

	bolt "go.etcd.io/bbolt"
)

// The change log: a line for each commit, CRC-32C of the JSON in hex, a space,
// the JSON.
var logKinds = []Kind{
	{"log missing", "the change log is missing, empty, or something else", instead("M4", theLog, logFile)},
	{"log cut", "the change log lost its end", func(s *store) error {
		lines, err := s.logLines()
		if err != nil {
			return err
		}
		keep, err := s.notInTail(lines)
		if err != nil {
			return err
		}
		n := s.IntN(keep) // the line after those says something
		for !bytes.Contains(lines[n], []byte(`"changes"`)) {
			n = s.IntN(keep)
		}
		s.did("the change log lost all but %d of %d lines", n, len(lines))
		s.must("M4", theLog, logFile)
		return s.writeLog(lines[:n])
	}},
	{"log flipped", "a bit of the change log is the other one", func(s *store) error {
		lines, err := s.logLines()
		if err != nil {
			return err
		}
		i := s.IntN(len(lines) - 1) // the last one may be torn
		at, bit := s.IntN(len(lines[i])-1), s.IntN(8)
		if lines[i][at]^1<<bit == '\n' {
			bit ^= 1
		}
		s.did("line %d of the change log: bit %d of byte %d flipped", i+1, bit, at)
		s.must("M4", theLog, logFile)
		lines[i][at] ^= 1 << bit
		return s.writeLog(lines)
	}},
	{"log line lost", "a line is missing in the middle of the change log", func(s *store) error {
		lines, err := s.logLines()
		if err != nil {
			return err
		}
		i := numbered(lines) + s.IntN(len(lines)-numbered(lines)-1)
		s.did("line %d of the change log is missing", i+1)
		s.must("M4", theLog, logFile)
		return s.writeLog(append(lines[:i:i], lines[i+1:]...))
	}},
	{"log of another", "the change log is that of another store", func(s *store) error {
		lines, err := s.logLines()
		if err != nil {
			return err
		}
		s.did("the change log is of another store")
		s.must("M4", theLog, logFile)
		lines[0] = line(jsonOf(map[string]any{"store": s.hex(24), "seq": 1}))
		return s.writeLog(lines)
	}},
	{"log ahead", "the change log tells of changes that the database has not", func(s *store) error {
		var st state
		err := s.view(func(tx *bolt.Tx) (err error) {
			st, err = readState(tx)
			return err
		})
		if err != nil {
			return err
		}
		s.did("the change log tells of change %d", st.Change+1)
		s.must("M4", theLog, logFile)
		return s.appendLog(jsonOf(map[string]any{"seq": st.Change + 1, "changes": []change{{Bucket: "images", Key: "ahead"}}}))
	}},
}

func line(body []byte) []byte {
	return fmt.Appendf(nil, "%08x %s\n", crc32.Checksum(body, castagnoli), body)
}

func (s *store) appendLog(body []byte) error {
	f, err := os.OpenFile(s.path(logFile), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(line(body))
	return errors.Join(err, f.Close())
}

// logLines returns the lines with their ends.
func (s *store) logLines() ([][]byte, error) {
	data, err := os.ReadFile(s.path(logFile))
	lines := bytes.SplitAfter(data, []byte("\n"))
	return lines[:len(lines)-1], err
}

func (s *store) writeLog(lines [][]byte) error {
	return fill(s.path(logFile), bytes.Join(lines, nil))
}

// seqOf is the number of a line's change.
func seqOf(line []byte) uint64 {
	_, rest, _ := bytes.Cut(line, []byte(`"seq":`))
	n := bytes.IndexAny(rest, ",}")
	seq, err := strconv.ParseUint(string(rest[:max(n, 0)]), 10, 64)
	if err != nil {
		return 0
	}
	return seq
}

// numbered returns the first line after those of the beginning, which share a
// number.
func numbered(lines [][]byte) int {
	for i := range lines {
		if seqOf(lines[i]) != seqOf(lines[0]) {
			return i
		}
	}
	return len(lines)
}

// notInTail counts the lines that the database does not hold as well.
func (s *store) notInTail(lines [][]byte) (n int, err error) {
	tail, err := s.keys("logtail")
	if err != nil {
		return 0, err
	}
	first := ^uint64(0)
	if len(tail) > 0 {
		if first, err = strconv.ParseUint(tail[0], 16, 64); err != nil {
			return 0, err
		}
	}
	for n < len(lines) && seqOf(lines[n]) < first {
		n++
	}
	if !bytes.Contains(bytes.Join(lines[:n], nil), []byte(`"changes"`)) {
		return 0, errors.New("the database has the whole change log")
	}
	return n, nil
}
