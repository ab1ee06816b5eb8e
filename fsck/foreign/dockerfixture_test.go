package foreign_test

import (
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"

	"varve.dev/internal/testkit"
)

// dockerRoot is a data root as dockerd 20.10 lays it out, made by hand; one
// that a real dockerd made is held against the same checks in cmd/varve.
type dockerRoot struct {
	dir    string
	image  digest.Digest
	diffs  []digest.Digest
	chains []digest.Digest
}

const (
	dockerName   = "registry.example:5000/team/image:1"
	dockerPinned = "registry.example:5000/team/image"
)

// makeDocker unpacks an image, and makes a container of it.
func makeDocker(t *testing.T, img testkit.Image) dockerRoot {
	t.Helper()
	testkit.NeedRoot(t)
	r := dockerRoot{dir: filepath.Join(t.TempDir(), "docker")}
	m, config := testkit.ReadImage(t, img)
	r.image, r.diffs = m.Config.Digest, config.RootFS.DiffIDs
	data, err := os.ReadFile(testkit.BlobPath(img.Dir, r.image))
	must(t, err)
	r.write(t, "image/overlay2/imagedb/content/sha256/"+r.image.Encoded(), string(data))
	r.write(t, "image/overlay2/repositories.json", string(jsonOf(t, map[string]any{"Repositories": map[string]any{dockerPinned: map[string]any{
		dockerName: r.image,
		dockerPinned + "@" + img.Target.Digest.String(): r.image,
	}}})))
	lower := ""
	for i := range r.diffs {
		r.chains = append(r.chains, identity.ChainID(r.diffs[:i+1]))
		r.layer(t, i, testkit.BlobPath(img.Dir, m.Layers[i].Digest), m.Layers[i])
		lower = strings.TrimSuffix(r.links(t, r.cache(i), lower)+":"+lower, ":")
	}
	r.container(t, lower)
	return r
}

func (r dockerRoot) path(name string) string { return filepath.Join(r.dir, name) }

func (r dockerRoot) write(t *testing.T, name, data string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(r.path(name)), 0o755), os.WriteFile(r.path(name), []byte(data), 0o644))
}

// cache is the folder of a layer's tree.
func (r dockerRoot) cache(layer int) string { return fmt.Sprintf("%064x", layer+1) }

func (r dockerRoot) tree(layer int) string { return r.path("overlay2/" + r.cache(layer) + "/diff") }

func (r dockerRoot) record(layer int, name string) string {
	return "image/overlay2/layerdb/sha256/" + r.chains[layer].Encoded() + "/" + name
}

func (r dockerRoot) layer(t *testing.T, i int, blob string, d ocispec.Descriptor) {
	t.Helper()
	r.write(t, r.record(i, "diff"), r.diffs[i].String())
	r.write(t, r.record(i, "cache-id"), r.cache(i))
	if i > 0 {
		r.write(t, r.record(i, "parent"), r.chains[i-1].String())
	}
	r.write(t, "image/overlay2/distribution/v2metadata-by-diffid/sha256/"+r.diffs[i].Encoded(),
		string(jsonOf(t, []any{map[string]any{"Digest": d.Digest, "SourceRepository": dockerPinned, "HMAC": ""}})))
	f, err := os.Open(blob)
	must(t, err)
	defer f.Close()
	z, err := compression.DecompressStream(f)
	must(t, err)
	defer z.Close()
	split, err := os.Create(r.path(r.record(i, "tar-split.json.gz")))
	must(t, err)
	defer split.Close()
	gz := gzip.NewWriter(split)
	stream, done, err := asm.NewInputTarStreamWithDone(z, storage.NewJSONPacker(gz), nil)
	must(t, err, os.MkdirAll(r.tree(i), 0o755))
	size, err := archive.Apply(t.Context(), r.tree(i), stream, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	_, cerr := io.Copy(io.Discard, stream)
	must(t, err, cerr, <-done, gz.Close())
	r.write(t, r.record(i, "size"), fmt.Sprint(size))
}

// links writes what overlay2 notes of a tree, and returns its short name.
func (r dockerRoot) links(t *testing.T, cache, lower string) string {
	t.Helper()
	link := strings.ToUpper(cache[len(cache)-26:])
	r.write(t, "overlay2/"+cache+"/link", link)
	if lower != "" {
		r.write(t, "overlay2/"+cache+"/lower", lower)
	}
	must(t, os.MkdirAll(r.path("overlay2/l"), 0o700), os.Symlink("../"+cache+"/diff", r.path("overlay2/l/"+link)))
	return "l/" + link
}

func (r dockerRoot) container(t *testing.T, lower string) {
	t.Helper()
	id := strings.Repeat("c", 64)
	for name, tree := range map[string]string{"mount-id": strings.Repeat("d", 64), "init-id": strings.Repeat("d", 64) + "-init"} {
		r.write(t, "image/overlay2/layerdb/mounts/"+id+"/"+name, tree)
		must(t, os.MkdirAll(r.path("overlay2/"+tree+"/diff"), 0o755))
		r.links(t, tree, lower)
	}
	r.write(t, "image/overlay2/layerdb/mounts/"+id+"/parent", r.chains[len(r.chains)-1].String())
	r.write(t, "containers/"+id+"/config.v2.json", "{}")
	r.write(t, "containers/"+id+"/hostconfig.json", "{}")
}
