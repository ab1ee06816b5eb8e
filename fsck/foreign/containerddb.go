package foreign

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"varve.dev/errdefs"
	"varve.dev/fsck/pages"
)

// overlayfs is the name of the one snapshotter whose trees are compared.
const overlayfs = "overlayfs"

// ctrNamespace is what containerd's database has in one namespace. The schema
// is described in containerd's core/metadata/buckets.go.
type ctrNamespace struct {
	name       string
	images     map[string]ocispec.Descriptor
	blobs      map[digest.Digest]ctrBlob
	snapshots  map[string]string // key → name in the snapshotter overlayfs
	others     map[string]int    // snapshots of other snapshotters
	containers map[string]ctrContainer
}

type ctrBlob struct {
	size   int64
	labels map[string]string
}

type ctrContainer struct{ image, snapshotter, key string }

// ctrSnapshot is what the snapshotter's own database has (containerd's
// core/snapshots/storage/bolt.go).
type ctrSnapshot struct {
	id     uint64 // names its folder
	parent string
	kind   byte
	size   int64
}

// ctrCommitted is the kind of a snapshot that does not change any more.
const ctrCommitted = 3

// lockTimeout is how long containerd may take to let go of a database.
const lockTimeout = time.Second

// errDamaged is the kind of a database that cannot be read to its end.
var errDamaged = errors.New("damaged")

// readBolt reads a database that nobody has open. It changes nothing, and a
// damaged one ends in errDamaged, not in a panic.
func readBolt(name string, read func(*bolt.Tx)) (err error) {
	if fi, err := os.Lstat(name); err != nil {
		return err
	} else if !fi.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file: %w", name, errDamaged)
	}
	var file *os.File // bbolt leaves it open, and locked, if it panics
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			file.Close()
			err = fmt.Errorf("reading it ends in %v: %w", r, errDamaged)
		}
	}()
	db, err := bolt.Open(name, 0, &bolt.Options{
		ReadOnly: true, Timeout: lockTimeout,
		OpenFile: func(name string, _ int, _ fs.FileMode) (*os.File, error) {
			var err error
			file, err = os.OpenFile(name, os.O_RDONLY, 0)
			return file, err
		},
	})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return fmt.Errorf("containerd has %s open, stop it first: %w", name, errdefs.ErrUnavailable)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	case err != nil:
		return fmt.Errorf("%w: %w", err, errDamaged)
	}
	defer db.Close()
	// What is wrong with the list of free pages only matters to writers.
	var list *pages.FreeListError
	if err := pages.Walk(file); err != nil && !errors.As(err, &list) {
		return fmt.Errorf("%w: %w", err, errDamaged)
	}
	return db.View(func(tx *bolt.Tx) error {
		read(tx)
		return nil
	})
}

// buckets calls fn with each bucket in the one at a path.
func buckets(tx *bolt.Tx, path []string, fn func(name string, b *bolt.Bucket)) {
	if b := bucket(tx, path...); b != nil {
		each(b, fn)
	}
}

func bucket(tx *bolt.Tx, path ...string) *bolt.Bucket {
	b := tx.Bucket([]byte(path[0]))
	for _, name := range path[1:] {
		if b == nil {
			return nil
		}
		b = b.Bucket([]byte(name))
	}
	return b
}

func each(b *bolt.Bucket, fn func(name string, b *bolt.Bucket)) {
	_ = b.ForEachBucket(func(k []byte) error {
		fn(string(k), b.Bucket(k))
		return nil
	})
}

func text(b *bolt.Bucket, key string) string { return string(b.Get([]byte(key))) }

// number reads a signed varint, -1 if there is none.
func number(b *bolt.Bucket, key string) int64 {
	n, k := binary.Varint(b.Get([]byte(key)))
	if k <= 0 {
		return -1
	}
	return n
}

func labels(b *bolt.Bucket) map[string]string {
	out := map[string]string{}
	if l := b.Bucket([]byte("labels")); l != nil {
		_ = l.ForEach(func(k, v []byte) error {
			out[string(k)] = string(v)
			return nil
		})
	}
	return out
}

// readNamespaces reads meta.db.
func readNamespaces(root string) (out []*ctrNamespace, err error) {
	err = readBolt(filepath.Join(root, ctrMeta), func(tx *bolt.Tx) {
		buckets(tx, []string{"v1"}, func(name string, _ *bolt.Bucket) { out = append(out, readNamespace(tx, name)) })
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func readNamespace(tx *bolt.Tx, name string) *ctrNamespace {
	n := &ctrNamespace{
		name: name, images: map[string]ocispec.Descriptor{}, blobs: map[digest.Digest]ctrBlob{}, snapshots: map[string]string{},
		others: map[string]int{}, containers: map[string]ctrContainer{},
	}
	buckets(tx, []string{"v1", name, "images"}, func(image string, b *bolt.Bucket) {
		var d ocispec.Descriptor
		if t := b.Bucket([]byte("target")); t != nil {
			d = ocispec.Descriptor{Digest: digest.Digest(text(t, "digest")), MediaType: text(t, "mediatype"), Size: number(t, "size")}
		}
		n.images[image] = d
	})
	buckets(tx, []string{"v1", name, "content", "blob"}, func(d string, b *bolt.Bucket) {
		n.blobs[digest.Digest(d)] = ctrBlob{size: number(b, "size"), labels: labels(b)}
	})
	buckets(tx, []string{"v1", name, "snapshots"}, func(snapshotter string, b *bolt.Bucket) {
		each(b, func(key string, s *bolt.Bucket) {
			if snapshotter == overlayfs {
				n.snapshots[key] = text(s, "name")
			} else {
				n.others[snapshotter]++
			}
		})
	})
	buckets(tx, []string{"v1", name, "containers"}, func(id string, b *bolt.Bucket) {
		n.containers[id] = ctrContainer{image: text(b, "image"), snapshotter: text(b, "snapshotter"), key: text(b, "snapshotKey")}
	})
	return n
}

// readSnapshots reads the snapshotter's database.
func readSnapshots(root string) (map[string]ctrSnapshot, error) {
	out := map[string]ctrSnapshot{}
	err := readBolt(filepath.Join(root, ctrSnapshots), func(tx *bolt.Tx) {
		buckets(tx, []string{"v1", "snapshots"}, func(name string, b *bolt.Bucket) {
			s := ctrSnapshot{parent: text(b, "parent"), size: number(b, "size")}
			s.id, _ = binary.Uvarint(b.Get([]byte("id")))
			if kind := b.Get([]byte("kind")); len(kind) == 1 {
				s.kind = kind[0]
			}
			out[name] = s
		})
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}
