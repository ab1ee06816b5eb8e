package testkit

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
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

// TestAwkwardIsWellFormed unpacks the awkward image with a reader that knows
// nothing of layers: each stream has to be readable to its end, hash to its
// DiffID, and hold the sparse files' contents.
func TestAwkwardIsWellFormed(t *testing.T) {
	img := Awkward(t)
	files := map[string]string{}
	for i, r := range openLayers(t, img) {
		hash := digest.Canonical.Digester()
		readTar(t, io.TeeReader(r.stream, hash.Hash()), files)
		if _, err := io.Copy(hash.Hash(), r.stream); err != nil {
			t.Fatal(err)
		}
		if hash.Digest() != r.diffID {
			t.Errorf("layer %d hashes to %s, the config says %s", i, hash.Digest(), r.diffID)
		}
	}
	gnu, err := GNUSparseLayer()
	if err != nil {
		t.Fatal(err)
	}
	readTar(t, bytes.NewReader(gnu), files)
	for name, want := range map[string]Hole{"sparse/pax": SparsePAX, "sparse/tail": SparseTail, "sparse/gnu": SparseGNU} {
		if files[name] != string(want.Bytes()) {
			t.Errorf("%s reads back differently", name)
		}
	}
}

// readTar adds every entry of the stream to files.
func readTar(t *testing.T, stream io.Reader, files map[string]string) {
	t.Helper()
	tr := tar.NewReader(stream)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatalf("%q: %v", h.Name, err)
		}
		files[h.Name] = string(data)
	}
}

type openLayer struct {
	stream io.Reader
	diffID digest.Digest
}

func openLayers(t *testing.T, img Image) (layers []openLayer) {
	t.Helper()
	var manifest ocispec.Manifest
	var config ocispec.Image
	readJSON(t, BlobPath(img.Dir, img.Target.Digest), &manifest)
	readJSON(t, BlobPath(img.Dir, manifest.Config.Digest), &config)
	for i, desc := range manifest.Layers {
		f, err := os.Open(BlobPath(img.Dir, desc.Digest))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		var stream io.Reader = f
		switch Compression(desc.MediaType) {
		case Gzip:
			stream, err = gzip.NewReader(f)
		case Zstd:
			stream, err = zstd.NewReader(f)
		}
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, openLayer{stream, config.RootFS.DiffIDs[i]})
	}
	return layers
}

func readJSON(t *testing.T, path string, v any) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatal(err)
	}
}
