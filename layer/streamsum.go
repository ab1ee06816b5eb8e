package layer

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"sync"

	"varve.dev/layout"
)

// streamSum hashes a stream beside its reader: on another core, a bounded
// number of blocks behind.
type streamSum struct {
	r      io.Reader
	size   int64
	blocks chan []byte
	free   chan []byte
	once   sync.Once
	done   chan string
}

// The hash may be this many blocks behind the reader: 1 MiB a stream.
const (
	sumBlocks = 8
	sumBlock  = 128 << 10
)

func newStreamSum(r io.Reader) *streamSum {
	s := &streamSum{r: r, blocks: make(chan []byte, sumBlocks), free: make(chan []byte, sumBlocks), done: make(chan string, 1)}
	for range sumBlocks {
		s.free <- make([]byte, 0, sumBlock)
	}
	go func() {
		h := sha256.New()
		for b := range s.blocks {
			h.Write(b)
			s.free <- b[:0]
		}
		s.done <- hex.EncodeToString(h.Sum(nil))
	}()
	return s
}

func (s *streamSum) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.size += int64(n)
	for rest := p[:n]; len(rest) > 0; {
		b := <-s.free
		k := min(cap(b), len(rest))
		s.blocks <- append(b, rest[:k]...)
		rest = rest[k:]
	}
	return n, err
}

// stop ends the hashing goroutine.
func (s *streamSum) stop() { s.once.Do(func() { close(s.blocks) }) }

// result ends the stream and returns what it was.
func (s *streamSum) result() (layout.DiffID, int64) {
	s.stop()
	return layout.DiffID(string(layout.Algorithm) + ":" + <-s.done), s.size
}
