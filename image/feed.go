package image

import (
	"context"
	"io"
	"sync"
)

// feed lets readers follow a file that is still being written. A download
// goes at the speed of the network into the ingest and an unpacker behind it
// at its own, with the page cache as the buffer between them: neither holds
// the other up, and what an earlier pull left in the ingest is read like the
// rest.
type feed struct {
	mu    sync.Mutex
	from  io.ReaderAt
	size  int64
	ended bool
	err   error         // io.EOF once the whole was verified
	more  chan struct{} // closed and replaced whenever something changes
}

func newFeed() *feed { return &feed{more: make(chan struct{})} }

// start says where the bytes are and how many there are already.
func (f *feed) start(from io.ReaderAt, size int64) {
	f.change(func() { f.from, f.size = from, size })
}

// grew says that n more bytes can be read.
func (f *feed) grew(n int) { f.change(func() { f.size += int64(n) }) }

// end says that no more bytes come. nil promises that the bytes are the right
// ones; readers see io.EOF only then.
func (f *feed) end(err error) {
	if err == nil {
		err = io.EOF
	}
	f.change(func() { f.ended, f.err = true, err })
}

func (f *feed) change(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn()
	close(f.more)
	f.more = make(chan struct{})
}

func (f *feed) reader(ctx context.Context) io.Reader { return &feedReader{ctx: ctx, feed: f} }

type feedReader struct {
	ctx  context.Context
	feed *feed
	at   int64
}

func (r *feedReader) Read(p []byte) (int, error) {
	f := r.feed
	for {
		f.mu.Lock()
		from, size, ended, err, more := f.from, f.size, f.ended, f.err, f.more
		f.mu.Unlock()
		if r.at < size {
			n, err := from.ReadAt(p[:min(int64(len(p)), size-r.at)], r.at)
			r.at += int64(n)
			if n > 0 {
				return n, nil
			}
			return 0, err
		}
		if ended {
			return 0, err
		}
		select {
		case <-more:
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
	}
}
