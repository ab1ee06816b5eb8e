package daemon

import (
	"bufio"
	"net"
	"sync"
	"time"
)

// splitter hands connections out by the protocol that they begin with.
type splitter struct {
	listener     net.Listener
	http1, http2 *half
	ended        chan struct{}
	close        func() error
}

// half is a listener that gets some of another's connections.
type half struct {
	of    *splitter
	conns chan net.Conn
	once  sync.Once
	over  chan struct{}
}

// http2Begins is how a connection begins whose client knows that it speaks
// HTTP/2, as gRPC's do (RFC 9113, 3.4). No method of HTTP/1 begins so.
const http2Begins = "PRI"

// beginWait is how long a client may take to say anything.
const beginWait = 10 * time.Second

// split accepts connections until the listener is closed.
func split(l net.Listener) *splitter {
	// Two servers end; the second one need not be told that the first was faster.
	s := &splitter{listener: l, ended: make(chan struct{}), close: sync.OnceValue(l.Close)}
	s.http1 = &half{of: s, conns: make(chan net.Conn), over: make(chan struct{})}
	s.http2 = &half{of: s, conns: make(chan net.Conn), over: make(chan struct{})}
	go func() {
		defer close(s.ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go s.sort(conn)
		}
	}()
	return s
}

func (s *splitter) sort(conn net.Conn) {
	_ = conn.SetReadDeadline(time.Now().Add(beginWait))
	r := bufio.NewReader(conn)
	begin, err := r.Peek(len(http2Begins))
	if err != nil {
		conn.Close()
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	to := s.http1
	if string(begin) == http2Begins {
		to = s.http2
	}
	select {
	case to.conns <- &begun{conn, r}:
	case <-to.over:
		conn.Close()
	case <-s.ended:
		conn.Close()
	}
}

// begun is a connection of which some was read.
type begun struct {
	net.Conn
	r *bufio.Reader
}

func (b *begun) Read(p []byte) (int, error) { return b.r.Read(p) }

func (h *half) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.over:
	case <-h.of.ended:
	}
	return nil, net.ErrClosed
}

// Close ends this half, and accepting with it.
func (h *half) Close() error {
	h.once.Do(func() { close(h.over) })
	return h.of.close()
}

func (h *half) Addr() net.Addr { return h.of.listener.Addr() }
