package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
)

// roundTrip is a transport made of a function.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// silentBody gives some bytes and then nothing until the request ends.
type silentBody struct {
	ctx  context.Context
	data io.Reader
}

func (b *silentBody) Read(p []byte) (int, error) {
	if n, _ := b.data.Read(p); n > 0 {
		return n, nil
	}
	<-b.ctx.Done()
	return 0, b.ctx.Err()
}

func (b *silentBody) Close() error { return nil }

func answer(r *http.Request, code int, body string) *http.Response {
	return &http.Response{StatusCode: code, Status: fmt.Sprint(code, " ", http.StatusText(code)), Header: http.Header{}, Request: r,
		Body: &silentBody{r.Context(), strings.NewReader(body)}}
}

func get(t *testing.T, g *guard) (*http.Response, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://registry.example/v2/", nil)
	if err != nil {
		t.Fatal(err)
	}
	return g.RoundTrip(req)
}

// TestGuardEndsEveryWait runs through the default patience in virtual time.
func TestGuardEndsEveryWait(t *testing.T) {
	patience := DefaultPatience()
	t.Run("no answer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			asked := 0
			g := &guard{patience: patience, next: roundTrip(func(r *http.Request) (*http.Response, error) {
				asked++
				<-r.Context().Done()
				return nil, r.Context().Err()
			})}
			start := time.Now()
			_, err := get(t, g)
			took := time.Since(start)
			if !errors.Is(err, errdefs.ErrUnavailable) || asked < 2 || took > patience.Total+patience.Answer {
				t.Errorf("asked %d times in %s: %v", asked, took, err)
			}
		})
	})
	t.Run("silent body", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g := &guard{patience: patience, next: roundTrip(func(r *http.Request) (*http.Response, error) {
				return answer(r, http.StatusOK, "some"), nil
			})}
			resp, err := get(t, g)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			buf := make([]byte, 10)
			if n, err := resp.Body.Read(buf); n != 4 || err != nil {
				t.Fatal(n, err)
			}
			// A reader that takes its time is not a silent server.
			time.Sleep(10 * patience.Silence)
			start := time.Now()
			_, err = resp.Body.Read(buf)
			if took := time.Since(start); took != patience.Silence || !errors.Is(err, errSilent) {
				t.Errorf("after %s: %v", took, err)
			}
		})
	})
	t.Run("429", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			asked := 0
			g := &guard{patience: patience, next: roundTrip(func(r *http.Request) (*http.Response, error) {
				asked++
				if asked == 3 {
					return answer(r, http.StatusOK, ""), nil
				}
				resp := answer(r, http.StatusTooManyRequests, "")
				resp.Header.Set("Retry-After", "20")
				return resp, nil
			})}
			start := time.Now()
			resp, err := get(t, g)
			if took := time.Since(start); err != nil || resp.StatusCode != http.StatusOK || took != 40*time.Second {
				t.Errorf("after %s: %v, %v", took, resp, err)
			}
			discard(resp)
		})
	})
	t.Run("refused", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			asked := 0
			g := &guard{patience: patience, next: roundTrip(func(*http.Request) (*http.Response, error) {
				asked++
				return nil, syscall.ECONNREFUSED
			})}
			if _, err := get(t, g); !errors.Is(err, syscall.ECONNREFUSED) || asked != 1 {
				t.Errorf("asked %d times: %v", asked, err)
			}
		})
	})
}

// TestStreamPatience: a server that gives little and then falls silent, over
// and over, is given up; one that brings enough each time is followed to the
// end, however often it breaks.
func TestStreamPatience(t *testing.T) {
	const size = 10 << 20
	for _, test := range []struct {
		name   string
		each   int
		pause  time.Duration
		finish bool
	}{
		{"little", 100, 0, false},
		{"little and silent", 100, 30 * time.Second, false},
		{"enough", 100 << 10, 30 * time.Second, true},
		{"nothing", 0, 30 * time.Second, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				opened := 0
				s := &stream{
					ctx: t.Context(), desc: ocispec.Descriptor{Digest: digest.FromString("x"), Size: size},
					patience: DefaultPatience(), progress: time.Now(), what: "blob x",
					open: func(ctx context.Context, at int64) (io.ReadCloser, error) {
						opened++
						return &brokenBody{left: min(int64(test.each), size-at), pause: test.pause}, nil
					},
				}
				n, err := io.Copy(io.Discard, s)
				if test.finish != (err == nil) || (test.finish && n != size) {
					t.Errorf("%d bytes, %d connections, %v", n, opened, err)
				}
				if !test.finish && (!errors.Is(err, errdefs.ErrUnavailable) || opened > 20) {
					t.Errorf("%d connections, %v", opened, err)
				}
			})
		})
	}
}

// brokenBody ends with a reset after some bytes and a pause.
type brokenBody struct {
	left  int64
	pause time.Duration
}

func (b *brokenBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		time.Sleep(b.pause)
		return 0, syscall.ECONNRESET
	}
	n := min(int64(len(p)), b.left)
	b.left -= n
	return int(n), nil
}

func (b *brokenBody) Close() error { return nil }
