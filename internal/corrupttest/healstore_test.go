package corrupttest

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/durable"
	"varve.dev/internal/corrupt"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// built are the images that the store has made itself. The registry has them
// under names of its own.
var built = []string{"built:1", "built:2", "made:1"}

// sameName is an image that has the contents of every file of the others.
const sameName = "same:1"

// original is a store that copies are damaged of, and what has to come of them.
type original struct {
	dir    string
	trees  map[string]string   // image → hash, as trees returns it
	layers map[string][]string // image → layers, the bottom one first
	blobs  map[string][]string // image → what it consists of, but what was given up
}

// healStores makes one store for each mode.
func healStores(t *testing.T, p place) map[string]*original {
	t.Helper()
	kept := p.newStore(t)
	var ops []op
	for _, name := range built {
		ops = append(ops, tag(name, p.ref(name)), func(ctx context.Context, e *daemon.Engine) error {
			_, err := e.Push(ctx, varve.PushRequest{Reference: p.ref(name), Registry: varve.Registry{PlainHTTP: true}}, nil)
			return err
		})
	}
	p.work(t, kept, ops...)
	dir := t.TempDir()
	given, same := filepath.Join(dir, "given"), filepath.Join(dir, "same")
	must(t, copyStore(kept, given), copyStore(kept, same))
	p.registry.Push(t, sameContents(t, kept), sameName)
	p.work(t, same, p.pull(sameName))
	for _, store := range []string{given, same} {
		p.giveUp(t, store)
	}
	out := map[string]*original{}
	for name, store := range map[string]string{"kept": kept, "given": given, "same": same} {
		out[name] = p.original(t, store)
	}
	return out
}

// sameContents makes an image of one layer with the contents of every file of
// a store's layers, under other names.
func sameContents(t *testing.T, store string) testkit.Image {
	t.Helper()
	files := map[string][]byte{}
	must(t, filepath.WalkDir(filepath.Join(store, layout.LayersDir), func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(name)
		files[layout.Algorithm.FromBytes(data).Encoded()] = data
		return err
	}))
	l, err := testkit.NewLayout(t.TempDir())
	must(t, err)
	layer, err := l.AddLayer(testkit.Gzip, "the same contents", func(b *testkit.LayerBuilder) {
		for _, sum := range slices.Sorted(maps.Keys(files)) {
			b.Text(sum, string(files[sum]))
		}
	})
	must(t, err)
	manifest, err := l.AddImage(ocispec.ImageConfig{}, layer)
	must(t, err)
	image, err := l.Finish(sameName, manifest)
	must(t, err)
	return image
}

// giveUp takes the blobs of layers that are unpacked out of a store, as the
// store does with what nothing refers to.
func (p place) giveUp(t *testing.T, store string) {
	t.Helper()
	var gone []string
	p.inside(t, store, func(db *metadata.DB) error {
		return db.Update(t.Context(), func(tx *metadata.Tx) error {
			for _, manifest := range layerBlobs(t, store) {
				for _, blob := range manifest.Layers {
					e := layout.Edge{Parent: manifest.node, Rel: layout.RelContent, Child: layout.BlobNode(layout.BlobDigest(blob.Digest))}
					if err := tx.Unlink(e); err != nil {
						return err
					}
					gone = append(gone, layout.BlobPath(layout.BlobDigest(blob.Digest)))
				}
			}
			return nil
		})
	})
	for _, blob := range gone {
		if _, err := os.Lstat(filepath.Join(store, blob)); !os.IsNotExist(err) {
			t.Fatalf("%s is still there (%v)", blob, err)
		}
	}
	if len(gone) == 0 {
		t.Fatal("no blob was given up")
	}
}

type layersOf struct {
	ocispec.Manifest
	node layout.Node
}

// layerBlobs returns the manifests of a store.
func layerBlobs(t *testing.T, store string) (all []layersOf) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(store, layout.BlobsDir, "*", "*", "*"))
	must(t, err)
	for _, name := range names {
		data, err := os.ReadFile(name)
		must(t, err)
		var m layersOf
		if json.Unmarshal(data, &m.Manifest) == nil && len(m.Layers) > 0 && m.Config.Digest != "" {
			m.node = layout.BlobNode(layout.BlobDigest(layout.Algorithm.FromBytes(data)))
			all = append(all, m)
		}
	}
	return all
}

// inside opens a store, hands its database to do, and closes it.
func (p place) inside(t *testing.T, store string, do func(*metadata.DB) error) {
	t.Helper()
	var err error
	e, oerr := daemon.Open(t.Context(), daemon.Options{Root: store, State: p.state, Opened: func(_ *durable.Root, db *metadata.DB) { err = do(db) }})
	must(t, oerr)
	must(t, err, e.Close(t.Context()))
}

// original looks at a store before anything is damaged. It is clean.
func (p place) original(t *testing.T, store string) *original {
	t.Helper()
	found, err := closed(store)
	must(t, err)
	if len(found) > 0 {
		t.Fatalf("before anything was damaged: %+v", found)
	}
	o := &original{dir: store, blobs: map[string][]string{}}
	o.layers, err = corrupt.Images(store)
	must(t, err)
	o.trees, err = trees(store)
	must(t, err)
	if len(o.trees) == 0 {
		t.Fatal("no image is unpacked")
	}
	p.inside(t, store, func(db *metadata.DB) error {
		return db.View(t.Context(), func(tx *metadata.Tx) error {
			return tx.Images().Each("", func(name string, rec layout.ImageRecord) error {
				o.blobs[name] = consistsOf(store, string(rec.Target.Digest))
				return nil
			})
		})
	})
	return o
}

// consistsOf returns a blob and those that it names, as far as they are there.
func consistsOf(store, digest string) (all []string) {
	if digest == "" {
		return nil
	}
	data, err := os.ReadFile(filepath.Join(store, layout.BlobPath(layout.BlobDigest(digest))))
	if err != nil {
		return nil
	}
	all = append(all, digest)
	var doc struct {
		Config            ocispec.Descriptor
		Layers, Manifests []ocispec.Descriptor
	}
	if json.Unmarshal(data, &doc) != nil {
		return all
	}
	for _, d := range slices.Concat([]ocispec.Descriptor{doc.Config}, doc.Layers, doc.Manifests) {
		all = append(all, consistsOf(store, d.Digest.String())...)
	}
	return all
}

// on returns the images that stand on a layer or consist of a blob, as findings
// name them.
func (o *original) on(object string) (images []string) {
	kind, id, _ := strings.Cut(object, " ")
	of := map[string]map[string][]string{layout.KindLayer: o.layers, layout.KindBlob: o.blobs}[kind]
	for image, parts := range of {
		if slices.Contains(parts, id) {
			images = append(images, image)
		}
	}
	slices.Sort(images)
	return images
}

// hostsFor writes a folder of hosts.toml that leads every registry to one
// address.
func hostsFor(dir, addr string) (string, error) {
	hosts := filepath.Join(dir, "hosts")
	if err := os.MkdirAll(filepath.Join(hosts, "_default"), 0o755); err != nil {
		return "", err
	}
	return hosts, os.WriteFile(filepath.Join(hosts, "_default", "hosts.toml"), fmt.Appendf(nil, "server = \"http://%s\"\n", addr), 0o644)
}
