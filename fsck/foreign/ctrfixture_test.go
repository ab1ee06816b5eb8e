package foreign_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/log"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"varve.dev/internal/testkit"
)

// containerdRoot is a root as containerd makes it, by containerd's own
// packages: blobs, image, unpacked layers, a container's writable snapshot.
type containerdRoot struct {
	dir      string
	manifest ocispec.Manifest
	chains   []string
}

// Whether its disk has fs-verity is not what is tested.
func init() { _ = log.SetLevel("error") }

const containerdName = "registry.example:5000/team/image:1"

// makeContainerd unpacks an image, in the namespace default if none is named.
func makeContainerd(t *testing.T, img testkit.Image, spaces ...string) containerdRoot {
	t.Helper()
	testkit.NeedRoot(t)
	r := containerdRoot{dir: filepath.Join(t.TempDir(), "root")}
	var config ocispec.Image
	r.manifest, config = testkit.ReadImage(t, img)
	for i := range config.RootFS.DiffIDs {
		r.chains = append(r.chains, identity.ChainID(config.RootFS.DiffIDs[:i+1]).String())
	}
	store, err := local.NewStore(filepath.Join(r.dir, "io.containerd.content.v1.content"))
	must(t, err)
	sn, err := overlay.NewSnapshotter(filepath.Join(r.dir, "io.containerd.snapshotter.v1.overlayfs"))
	must(t, err)
	defer sn.Close()
	meta := filepath.Join(r.dir, "io.containerd.metadata.v1.bolt")
	must(t, os.MkdirAll(meta, 0o711))
	db, err := bolt.Open(filepath.Join(meta, "meta.db"), 0o644, nil)
	must(t, err)
	defer db.Close()
	mdb := metadata.NewDB(db, store, map[string]snapshots.Snapshotter{"overlayfs": sn})
	must(t, mdb.Init(t.Context()))
	if len(spaces) == 0 {
		spaces = []string{"default"}
	}
	for _, name := range spaces {
		ctx := namespaces.WithNamespace(t.Context(), name)
		for _, b := range append([]ocispec.Descriptor{img.Target, r.manifest.Config}, r.manifest.Layers...) {
			f, err := os.Open(testkit.BlobPath(img.Dir, b.Digest))
			must(t, err)
			// As the fetcher labels them: the registry without its port.
			from := content.WithLabels(map[string]string{"containerd.io/distribution.source.registry.example": "team/image"})
			must(t, content.WriteBlob(ctx, mdb.ContentStore(), b.Digest.String(), f, ocispec.Descriptor{Digest: b.Digest, Size: b.Size}, from))
			f.Close()
		}
		_, err = metadata.NewImageStore(mdb).Create(ctx, images.Image{Name: containerdName, Target: img.Target})
		must(t, err)
		r.unpack(t, ctx, mdb, config)
	}
	return r
}

// change changes the metadata as containerd would.
func (r containerdRoot) change(t *testing.T, fn func(namespace *bolt.Bucket) error) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(r.dir, "io.containerd.metadata.v1.bolt/meta.db"), 0o600, nil)
	must(t, err)
	must(t, db.Update(func(tx *bolt.Tx) error { return fn(tx.Bucket([]byte("v1")).Bucket([]byte("default"))) }), db.Close())
}

func (r containerdRoot) unpack(t *testing.T, ctx context.Context, mdb *metadata.DB, config ocispec.Image) {
	t.Helper()
	var layers []rootfs.Layer
	for i, b := range r.manifest.Layers {
		layers = append(layers, rootfs.Layer{Diff: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: config.RootFS.DiffIDs[i]}, Blob: b})
	}
	sn := mdb.Snapshotter("overlayfs")
	top, err := rootfs.ApplyLayers(ctx, layers, sn, apply.NewFileSystemApplier(mdb.ContentStore()))
	must(t, err)
	_, err = sn.Prepare(ctx, "container", top.String())
	must(t, err)
}

// tree is where a layer is unpacked: containerd numbers snapshots, and makes
// two for each layer's one that stays.
func (r containerdRoot) tree(t *testing.T, layer int) string {
	t.Helper()
	db, err := bolt.Open(filepath.Join(r.dir, "io.containerd.snapshotter.v1.overlayfs/metadata.db"), 0, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	must(t, err)
	defer db.Close()
	id := 0
	must(t, db.View(func(tx *bolt.Tx) error {
		all := tx.Bucket([]byte("v1")).Bucket([]byte("snapshots"))
		return all.ForEachBucket(func(k []byte) error {
			if filepath.Base(string(k)) == r.chains[layer] {
				id = int(all.Bucket(k).Get([]byte("id"))[0])
			}
			return nil
		})
	}))
	return filepath.Join(r.dir, "io.containerd.snapshotter.v1.overlayfs/snapshots", fmt.Sprint(id), "fs")
}

// jsonOf is for fixtures that are written by hand.
func jsonOf(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	must(t, err)
	return data
}
