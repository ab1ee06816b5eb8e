package testkit

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Push puts img into the registry as repoTag ("busybox:latest") and returns
// the full reference.
func (r *RegistryServer) Push(t testing.TB, img Image, repoTag string) string {
	t.Helper()
	if err := img.Push(r.Addr, repoTag); err != nil {
		t.Fatal(err)
	}
	return r.Ref(repoTag)
}

// Push puts img, with everything it names that the layout has, into the
// registry that speaks plain HTTP at addr. Blobs that are there are sent
// again: a fixture's push is not the code under test and stays simple.
func (img Image) Push(addr, repoTag string) error {
	repo, tag, ok := strings.Cut(repoTag, ":")
	if !ok {
		return fmt.Errorf("%q has no tag", repoTag)
	}
	p := pusher{dir: img.Dir, base: "http://" + addr + "/v2/" + repo}
	return p.manifest(img.Target, tag)
}

type pusher struct{ dir, base string }

func (p pusher) manifest(desc ocispec.Descriptor, tag string) error {
	data, err := os.ReadFile(BlobPath(p.dir, desc.Digest))
	if err != nil {
		return err
	}
	var doc struct {
		Config    *ocispec.Descriptor
		Layers    []ocispec.Descriptor
		Manifests []ocispec.Descriptor
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return err
	}
	for _, child := range doc.Manifests {
		if err := p.manifest(child, child.Digest.String()); err != nil {
			return err
		}
	}
	blobs := doc.Layers
	if doc.Config != nil {
		blobs = append(blobs, *doc.Config)
	}
	for _, blob := range blobs {
		if err := p.blob(blob.Digest); err != nil {
			return err
		}
	}
	return p.put(p.base+"/manifests/"+tag, desc.MediaType, strings.NewReader(string(data)), int64(len(data)))
}

func (p pusher) blob(d digest.Digest) error {
	f, err := os.Open(BlobPath(p.dir, d))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	resp, err := http.Post(p.base+"/blobs/uploads/", "", nil)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusAccepted {
		return fmt.Errorf("start upload of %s: %s", d, resp.Status)
	}
	location, err := resp.Location()
	if err != nil {
		return err
	}
	query := location.Query()
	query.Set("digest", d.String())
	location.RawQuery = query.Encode()
	return p.put(location.String(), "application/octet-stream", f, info.Size())
}

func (p pusher) put(to, mediaType string, body io.Reader, size int64) error {
	req, err := http.NewRequest(http.MethodPut, to, body)
	if err != nil {
		return err
	}
	req.ContentLength = size
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1024))
		return fmt.Errorf("PUT %s: %s: %s", req.URL.Path, resp.Status, text)
	}
	return nil
}
