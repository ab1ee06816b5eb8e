package testkit

import (
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestProxyFaults asks for one blob under each fault and looks at what a
// client sees of it.
func TestProxyFaults(t *testing.T) {
	r := Registry(t)
	img := Busybox(t)
	r.Push(t, img, "b:1")
	var manifest ocispec.Manifest
	readJSON(t, BlobPath(img.Dir, img.Target.Digest), &manifest)
	layer := manifest.Layers[0]
	path := "/v2/b/blobs/" + layer.Digest.String()

	proxy := NewProxy(t, r.Addr, nil)
	client := &http.Client{Timeout: 500 * time.Millisecond, Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(t *testing.T, fault Fault, rangeFrom string) (*http.Response, []byte, error) {
		t.Helper()
		proxy.SetRule(func(*http.Request, int) Fault { return fault })
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+proxy.Addr+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if rangeFrom != "" {
			req.Header.Set("Range", "bytes="+rangeFrom+"-")
		}
		resp, err := client.Do(req)
		if err != nil {
			return nil, nil, err
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		return resp, data, err
	}

	_, whole, err := get(t, Fault{}, "")
	if err != nil || digest.FromBytes(whole) != layer.Digest {
		t.Fatalf("without a fault: %v, %d bytes", err, len(whole))
	}
	t.Run("flip", func(t *testing.T) {
		_, data, err := get(t, Fault{Flip: true, FlipByte: 100_000}, "99999")
		if err != nil || data[1] == whole[100_000] || data[0] != whole[99_999] || data[2] != whole[100_001] {
			t.Errorf("one byte should differ: %v", err)
		}
	})
	t.Run("cut", func(t *testing.T) {
		_, data, err := get(t, Fault{Cut: true, CutAt: 5000}, "")
		if !errors.Is(err, io.ErrUnexpectedEOF) || len(data) != 5000 {
			t.Errorf("got %d bytes and %v", len(data), err)
		}
	})
	t.Run("silent", func(t *testing.T) {
		_, data, err := get(t, Fault{Silent: true, SilentAt: 5000}, "")
		if err == nil || len(data) != 5000 {
			t.Errorf("got %d bytes and %v", len(data), err)
		}
	})
	t.Run("mute", func(t *testing.T) {
		if _, _, err := get(t, Fault{Mute: true}, ""); err == nil {
			t.Error("was answered")
		}
	})
	t.Run("no range", func(t *testing.T) {
		resp, data, err := get(t, Fault{NoRange: true}, "1000")
		if err != nil || resp.StatusCode != http.StatusOK || len(data) != len(whole) {
			t.Errorf("status %v, %d bytes, %v", resp.StatusCode, len(data), err)
		}
	})
	t.Run("status", func(t *testing.T) {
		resp, _, err := get(t, Fault{Status: http.StatusTooManyRequests, RetryAfter: 7}, "")
		if err != nil || resp.StatusCode != http.StatusTooManyRequests || resp.Header.Get("Retry-After") != "7" {
			t.Errorf("%v %v", resp, err)
		}
	})
	t.Run("short", func(t *testing.T) {
		resp, data, err := get(t, Fault{Short: true}, "")
		if err != nil || resp.ContentLength != layer.Size-1 || int64(len(data)) != layer.Size-1 {
			t.Errorf("got %d bytes and %v", len(data), err)
		}
	})
	if n := proxy.Count(http.MethodGet, layer.Digest.String()); n != 8 {
		t.Errorf("counted %d requests, made 8", n)
	}
}
