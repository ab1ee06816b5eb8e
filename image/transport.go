package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"syscall"
	"time"

	"varve.dev/errdefs"
)

// Patience bounds every wait for a registry. There is no operation without
// one of these, so a pull either goes on or ends.
type Patience struct {
	// Answer bounds the time from the request (or the last byte of its
	// body) to the header of the answer: name, connection and TLS included.
	Answer time.Duration
	// Silence bounds the time between two pieces of a body.
	Silence time.Duration
	// Attempts is how often a request is made, and how often a blob's stream
	// is taken up again without having come further in between.
	Attempts int
	// Backoff is the first wait between attempts; it doubles up to MaxBackoff.
	Backoff, MaxBackoff time.Duration
	// Total bounds the time without any progress over all attempts: none
	// begins later. A server that asks for a longer wait is told no.
	Total time.Duration
}

// DefaultPatience is what registries on bad lines need.
func DefaultPatience() Patience {
	return Patience{
		Answer: 30 * time.Second, Silence: 30 * time.Second,
		Attempts: 6, Backoff: 250 * time.Millisecond, MaxBackoff: 10 * time.Second,
		Total: 2 * time.Minute,
	}
}

// wait returns the pause before attempt n (1 is the first repetition), with a
// quarter of jitter so that a crowd of clients spreads.
func (p Patience) wait(n int) time.Duration {
	d := min(p.Backoff<<min(n-1, 16), p.MaxBackoff)
	if d <= 0 {
		return 0
	}
	return d - rand.N(d/4+1)
}

// Why a request of ours was ended by us.
var (
	errNoAnswer = errors.New("no answer")
	errSilent   = errors.New("no data")
	// errGaveUp marks an error after the last attempt: layers above do not
	// start over.
	errGaveUp = errors.New("gave up")
)

// requestError is a request that came to nothing.
type requestError struct {
	Host     string
	Attempts int   // 0 for a body that fell silent
	Err      error // without a kind
}

func (e *requestError) Error() string {
	if e.Attempts == 0 {
		return fmt.Sprintf("%s: %v", e.Host, e.Err)
	}
	return fmt.Sprintf("%s: %v (attempts: %d)", e.Host, e.Err, e.Attempts)
}

// Unwrap gives the kind and the reason.
func (e *requestError) Unwrap() []error {
	if e.Attempts == 0 {
		return []error{errdefs.ErrUnavailable, e.Err}
	}
	return []error{errdefs.ErrUnavailable, errGaveUp, e.Err}
}

// guard is the transport below everything that talks to a registry, tokens
// included. It bounds every wait, and repeats what may be repeated.
//
// The retries of containerd's resolver above it have no pause between them;
// what arrives there is final.
type guard struct {
	next     http.RoundTripper
	patience Patience
}

func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	start := time.Now()
	for attempt := 1; ; attempt++ {
		resp, err := g.once(req)
		pause, again := g.again(req, resp, err, attempt)
		if !again {
			return resp, err
		}
		if attempt >= g.patience.Attempts || time.Since(start)+pause > g.patience.Total {
			return nil, g.giveUp(req, resp, err, attempt)
		}
		discard(resp)
		if err := sleep(req.Context(), pause); err != nil {
			return nil, err
		}
	}
}

// again tells whether the request may and should be made again, and when.
func (g *guard) again(req *http.Request, resp *http.Response, err error, attempt int) (time.Duration, bool) {
	if req.Context().Err() != nil || !repeatable(req) {
		return 0, false
	}
	pause := g.patience.wait(attempt)
	if err != nil {
		return pause, transient(err)
	}
	switch resp.StatusCode {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return max(pause, retryAfter(resp)), true
	case http.StatusRequestTimeout, http.StatusInternalServerError, http.StatusBadGateway, http.StatusGatewayTimeout:
		return pause, true
	}
	return 0, false
}

// repeatable: without a body, and harmless when it is carried out twice. A
// POST without a body starts an upload or asks for a token.
func repeatable(req *http.Request) bool {
	return req.Body == nil || req.Body == http.NoBody
}

// transient errors are those of a connection that was there. One that is
// refused, a name that does not exist, a certificate that does not fit stay
// as they are, and the user learns at once.
func transient(err error) bool {
	var dns *net.DNSError
	switch {
	case errors.Is(err, errNoAnswer), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return true
	case errors.As(err, &dns):
		return dns.IsTemporary || dns.IsTimeout
	}
	return false
}

func (g *guard) giveUp(req *http.Request, resp *http.Response, err error, attempts int) error {
	if err == nil {
		defer discard(resp)
		err = fmt.Errorf("answered %s", resp.Status)
		if after := retryAfter(resp); after > 0 {
			err = fmt.Errorf("%w and asks to wait %s", err, after)
		}
	}
	return &requestError{Host: req.URL.Host, Attempts: attempts, Err: err}
}

func retryAfter(resp *http.Response) time.Duration {
	value := resp.Header.Get("Retry-After")
	if seconds, err := strconv.Atoi(value); err == nil && seconds >= 0 {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(0, time.Until(at))
	}
	return 0
}

// once makes one request under the guard's limits.
func (g *guard) once(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	timer := time.AfterFunc(g.patience.Answer, func() { cancel(errNoAnswer) })
	req = req.Clone(ctx)
	var body *sending
	if !repeatable(req) {
		body = &sending{ReadCloser: req.Body, timer: timer, limit: g.patience.Answer}
		req.Body = body
	}
	resp, err := g.next.RoundTrip(req)
	body.answered()
	timer.Stop()
	if err != nil {
		if cause := context.Cause(ctx); errors.Is(cause, errNoAnswer) {
			err = fmt.Errorf("%w within %s", cause, g.patience.Answer)
		}
		cancel(nil)
		return nil, err
	}
	resp.Body = &receiving{host: req.URL.Host, body: resp.Body, ctx: ctx, cancel: cancel, limit: g.patience.Silence}
	return resp, nil
}

// sending puts the deadline for the answer off while the body goes out. A
// server may answer before it has read all; the clock is then left alone.
type sending struct {
	io.ReadCloser
	limit time.Duration

	mu    sync.Mutex
	timer *time.Timer // nil once there was an answer
}

func (s *sending) Read(p []byte) (int, error) {
	n, err := s.ReadCloser.Read(p)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n > 0 && s.timer != nil {
		s.timer.Reset(s.limit)
	}
	return n, err
}

func (s *sending) answered() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer = nil
}

// receiving is a body whose every Read ends within the limit. The clock runs
// only during Read: a slow reader is not a silent server.
type receiving struct {
	host   string
	body   io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	limit  time.Duration
	once   sync.Once
	timer  *time.Timer
}

func (r *receiving) Read(p []byte) (int, error) {
	if r.timer == nil {
		r.timer = time.AfterFunc(r.limit, func() { r.cancel(errSilent) })
	} else {
		r.timer.Reset(r.limit)
	}
	n, err := r.body.Read(p)
	r.timer.Stop()
	if err != nil && err != io.EOF {
		if cause := context.Cause(r.ctx); errors.Is(cause, errSilent) {
			err = &requestError{Host: r.host, Err: fmt.Errorf("%w for %s", cause, r.limit)}
		}
	}
	return n, err
}

func (r *receiving) Close() (err error) {
	r.once.Do(func() {
		// First the request, then the body: a body that has more to come
		// would otherwise be drained for the sake of its connection.
		r.cancel(nil)
		err = r.body.Close()
	})
	return err
}

func discard(resp *http.Response) {
	if resp != nil && resp.Body != nil {
		resp.Body.Close()
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
