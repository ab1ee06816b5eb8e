package testkit

import (
	"context"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Fault is what a [Proxy] does to one response. The zero value passes it on.
type Fault struct {
	// FlipByte changes the byte at this offset of the body, if Flip is set.
	Flip     bool
	FlipByte int64
	// Cut closes the connection after this many bytes of the body.
	Cut   bool
	CutAt int64
	// Silent stops sending after this many bytes of the body and keeps the
	// connection open, until the client or the test ends.
	Silent   bool
	SilentAt int64
	// Mute accepts the request and never answers, not even with a header.
	Mute bool
	// NoRange hides the Range header from the registry: the body is whole.
	NoRange bool
	// Status answers with this code instead of asking the registry.
	Status int
	// RetryAfter goes with Status, in seconds.
	RetryAfter int
	// Short says one byte less in Content-Length and sends that much.
	Short bool
	// Delay holds each piece of the body back by this long.
	Delay time.Duration
	// Header replaces fields of the answer.
	Header http.Header
}

// Rule decides what happens to a request. n counts, from 1, the requests with
// the same method and path that this proxy has seen.
type Rule func(r *http.Request, n int) Fault

// Proxy stands before a registry and misbehaves as its rule says.
type Proxy struct {
	// Addr is host:port on loopback, as it stands in an image's name.
	Addr string

	ctx context.Context // of the test; silent answers end with it

	mu    sync.Mutex
	rule  Rule
	auth  *tokenAuth
	count map[string]int
	bytes map[string]int64
	log   []string
}

// NewProxy starts a proxy before the registry at upstream (host:port), for
// the length of the test.
func NewProxy(t testing.TB, upstream string, rule Rule) *Proxy {
	t.Helper()
	p, server := newProxy(t, upstream, rule)
	server.Start()
	p.Addr = server.Listener.Addr().String()
	return p
}

// NewTLSProxy is [NewProxy] with TLS. It returns the file with the
// certificate that its clients have to trust.
func NewTLSProxy(t testing.TB, upstream string, rule Rule) (p *Proxy, caFile string) {
	t.Helper()
	p, server := newProxy(t, upstream, rule)
	server.StartTLS()
	p.Addr = server.Listener.Addr().String()
	caFile = filepath.Join(t.TempDir(), "ca.pem")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(caFile, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	return p, caFile
}

func newProxy(t testing.TB, upstream string, rule Rule) (*Proxy, *httptest.Server) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	p := &Proxy{ctx: ctx, rule: rule, count: map[string]int{}, bytes: map[string]int64{}}
	transport := &http.Transport{DisableCompression: true}
	reverse := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: upstream})
	reverse.Transport = transport
	reverse.ModifyResponse = p.spoil
	reverse.ErrorHandler = func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }
	reverse.FlushInterval = -1 // what comes before a fault reaches the client
	silent := log.New(io.Discard, "", 0)
	reverse.ErrorLog = silent
	server := httptest.NewUnstartedServer(p.handler(reverse))
	server.Config.ErrorLog = silent
	t.Cleanup(func() {
		cancel() // ends what is silent, which Close waits for
		server.CloseClientConnections()
		server.Close()
		transport.CloseIdleConnections()
	})
	return p, server
}

// SetRule replaces the rule, for requests from now on.
func (p *Proxy) SetRule(rule Rule) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rule = rule
}

// Count is how many requests with this method had a path that ends in suffix.
func (p *Proxy) Count(method, suffix string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for key, c := range p.count {
		if m, path, _ := strings.Cut(key, " "); m == method && strings.HasSuffix(path, suffix) {
			n += c
		}
	}
	return n
}

// Sent is how many bytes went out for GETs of a path that ends in suffix, of
// what was asked for: not what the registry said instead.
func (p *Proxy) Sent(suffix string) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	var n int64
	for path, b := range p.bytes {
		if strings.HasSuffix(path, suffix) {
			n += b
		}
	}
	return n
}

// Requests lists what was asked, in order: "GET /v2/… bytes=10-".
func (p *Proxy) Requests() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.log...)
}

// Forget makes it as if nothing had been asked so far.
func (p *Proxy) Forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.count)
	clear(p.bytes)
	p.log = nil
}

// Ref is the name of repo:tag seen through this proxy.
func (p *Proxy) Ref(repoTag string) string { return p.Addr + "/" + repoTag }

type faultKey struct{}

func (p *Proxy) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if p.authorize(w, r) {
			return
		}
		fault := p.note(r)
		switch {
		case fault.Mute:
			select {
			case <-r.Context().Done():
			case <-p.ctx.Done():
			}
			panic(http.ErrAbortHandler)
		case fault.Status != 0:
			if fault.RetryAfter > 0 {
				w.Header().Set("Retry-After", strconv.Itoa(fault.RetryAfter))
			}
			http.Error(w, `{"errors":[{"code":"UNKNOWN","message":"made up by the proxy"}]}`, fault.Status)
			return
		}
		if fault.NoRange {
			r.Header.Del("Range")
		}
		// What the registry puts into Location has to lead back here.
		r.Host = p.Addr
		if r.TLS != nil {
			r.Header.Set("X-Forwarded-Proto", "https")
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), faultKey{}, fault)))
	})
}

func (p *Proxy) note(r *http.Request) Fault {
	p.mu.Lock()
	key := r.Method + " " + r.URL.Path
	p.count[key]++
	n, rule := p.count[key], p.rule
	p.log = append(p.log, strings.TrimSpace(key+" "+r.Header.Get("Range")))
	p.mu.Unlock()
	if rule == nil {
		return Fault{}
	}
	return rule(r, n)
}

// spoil puts the fault between the registry's body and the client.
func (p *Proxy) spoil(resp *http.Response) error {
	fault, _ := resp.Request.Context().Value(faultKey{}).(Fault)
	for key, values := range fault.Header {
		resp.Header[key] = values
	}
	body := &faultyBody{ReadCloser: resp.Body, fault: fault, proxy: p, req: resp.Request, left: -1, answer: resp.StatusCode < 300}
	if fault.Short && resp.ContentLength > 0 {
		resp.ContentLength--
		resp.Header.Set("Content-Length", strconv.FormatInt(resp.ContentLength, 10))
		body.left = resp.ContentLength
	}
	if fault.NoRange {
		resp.Header.Del("Accept-Ranges")
	}
	// Offsets of faults count from the start of the blob.
	if from, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), "bytes "); ok {
		start, _, _ := strings.Cut(from, "-")
		body.at, _ = strconv.ParseInt(start, 10, 64)
	}
	resp.Body = body
	return nil
}

// faultyBody is a registry's body with a fault in it. Offsets are those of
// the whole blob, also in the answer to a Range request.
type faultyBody struct {
	io.ReadCloser
	fault Fault
	proxy *Proxy
	req   *http.Request
	at    int64
	left  int64 // of a shortened body; -1: as long as it is

	answer bool // it is what was asked for
}

func (b *faultyBody) Read(buf []byte) (int, error) {
	if b.fault.Silent {
		if b.at >= b.fault.SilentAt {
			select {
			case <-b.req.Context().Done():
			case <-b.proxy.ctx.Done():
			}
			return 0, io.ErrUnexpectedEOF
		}
		buf = buf[:min(int64(len(buf)), b.fault.SilentAt-b.at)]
	}
	if b.fault.Cut {
		if b.at >= b.fault.CutAt {
			return 0, io.ErrUnexpectedEOF // the server then drops the connection
		}
		buf = buf[:min(int64(len(buf)), b.fault.CutAt-b.at)]
	}
	if b.left >= 0 {
		if b.left == 0 {
			return 0, io.EOF
		}
		buf = buf[:min(int64(len(buf)), b.left)]
	}
	if b.fault.Delay > 0 {
		time.Sleep(b.fault.Delay)
	}
	n, err := b.ReadCloser.Read(buf)
	if off := b.fault.FlipByte - b.at; b.fault.Flip && off >= 0 && off < int64(n) {
		buf[off] ^= 0x40
	}
	b.at += int64(n)
	if b.left > 0 {
		b.left -= int64(n)
	}
	if b.req.Method == http.MethodGet && b.answer {
		b.proxy.mu.Lock()
		b.proxy.bytes[b.req.URL.Path] += int64(n)
		b.proxy.mu.Unlock()
	}
	return n, err
}
