package testkit

import (
	"io"
	"net/http"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestBusyboxIsServed pushes the smallest image and reads its manifest back
// from the registry by tag.
func TestBusyboxIsServed(t *testing.T) {
	r := Registry(t)
	img := Busybox(t)
	r.Push(t, img, "lib/busybox:latest")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+r.Addr+"/v2/lib/busybox/manifests/latest", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", img.Target.MediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if got := digest.FromBytes(data); got != img.Target.Digest {
		t.Errorf("the registry serves %s as latest, pushed was %s", got, img.Target.Digest)
	}
}

// TestSameBytesEachTime makes an image in two caches.
func TestSameBytesEachTime(t *testing.T) {
	var seen []digest.Digest
	for range 2 {
		t.Setenv(cacheVariable, t.TempDir())
		seen = append(seen, Busybox(t).Target.Digest)
	}
	if seen[0] != seen[1] {
		t.Errorf("made twice, got %s and %s", seen[0], seen[1])
	}
}
