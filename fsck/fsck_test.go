package fsck_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/internal/testkit"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/snapshotter"
)

// store is one that has something of everything, closed.
type store struct {
	dir      string
	blob     layout.BlobDigest // held by the api
	top      layout.SnapshotKey
	layer    layout.LayerID // of top
	active   layout.LayerID
	manifest layout.BlobDigest // of the image
	config   layout.BlobDigest
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func makeStore(t *testing.T) *store {
	t.Helper()
	testkit.NeedRoot(t)
	s := &store{dir: t.TempDir()}
	root, err := durable.Create(s.dir, 0o711)
	must(t, err)
	must(t, journal.Create(root))
	db, err := metadata.Open(root, metadata.Options{})
	must(t, err)
	j, _, err := journal.Open(t.Context(), root, db)
	must(t, err)
	blobs := content.New(root, db, j)
	snaps := snapshotter.New(root, db, j, blobs)

	s.blob = putBlob(t, blobs, []byte("a blob"))
	_, err = snaps.Prepare(t.Context(), "work", "")
	must(t, err)
	tree, err := snaps.Tree(t.Context(), "work")
	must(t, err)
	fill(t, tree.Upper)
	must(t, snaps.Commit(t.Context(), "base", "work"))
	s.top = "base"
	_, err = snaps.Prepare(t.Context(), "active", "base")
	must(t, err)

	config, err := json.Marshal(ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromString("a stream")}}})
	must(t, err)
	s.config = putBlob(t, blobs, config)
	manifest, err := json.Marshal(ocispec.Manifest{Config: ocispec.Descriptor{Digest: s.config.Digest()}})
	must(t, err)
	s.manifest = putBlob(t, blobs, manifest)
	now := time.Now().UTC()
	must(t, db.Update(t.Context(), func(tx *metadata.Tx) error {
		base, err := tx.Snapshots().Get("base")
		if err != nil {
			return err
		}
		s.layer = base.Layer
		active, err := tx.Snapshots().Get("active")
		s.active = active.Layer
		return errors.Join(err,
			tx.PutImage("image", layout.ImageRecord{Target: ocispec.Descriptor{Digest: s.manifest.Digest()}}),
			tx.Link(layout.Edge{Parent: layout.BlobNode(s.manifest), Rel: layout.RelUnpacked, Child: layout.SnapshotNode("base")}),
			tx.PutCache("known", layout.CacheRecord{Snapshots: []layout.SnapshotKey{"base"}, LastUse: now}),
			root.MkdirAll(layout.ContainerPath("cafe"), 0o700),
			tx.Containers().Put("cafe", layout.ContainerRecord{Snapshot: "active"}),
			tx.Link(layout.Edge{Parent: layout.ContainerNode("cafe"), Rel: layout.RelRootfs, Child: layout.SnapshotNode("active")}),
		)
	}))
	must(t, errors.Join(j.Drain(t.Context()), j.Close(), db.Close(), root.Close()))
	return s
}

func putBlob(t *testing.T, blobs *content.Store, data []byte) layout.BlobDigest {
	t.Helper()
	d := digest.FromBytes(data)
	must(t, ccontent.WriteBlob(t.Context(), blobs, d.String(), bytes.NewReader(data), ocispec.Descriptor{Digest: d, Size: int64(len(data))}))
	return layout.BlobDigest(d)
}

func fill(t *testing.T, dir string) {
	t.Helper()
	must(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "d", "file"), []byte("contents"), 0o644))
	must(t, os.Link(filepath.Join(dir, "d", "file"), filepath.Join(dir, "hard")))
	must(t, os.Symlink("d/file", filepath.Join(dir, "link")))
	must(t, unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, unix.Setxattr(filepath.Join(dir, "d", "file"), "user.colour", []byte("grey"), 0))
}

func check(t *testing.T, dir string, level layout.Level) *fsck.Report {
	t.Helper()
	r, err := fsck.Run(context.WithoutCancel(t.Context()), fsck.Options{Root: dir, Level: level})
	must(t, err)
	return r
}

func ids(r *fsck.Report) []string {
	var out []string
	for _, f := range r.Findings {
		out = append(out, f.Invariant)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// in changes the database by hand.
func (s *store) in(t *testing.T, fn func(tx *bolt.Tx) error) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(s.dir, layout.DatabaseFile), 0o600, nil)
	must(t, err)
	must(t, errors.Join(db.Update(fn), db.Close()))
}

// put writes a record by hand, as if it had always been like this.
func (s *store) put(t *testing.T, bucket, key string, record any) {
	t.Helper()
	s.in(t, func(tx *bolt.Tx) error {
		value, err := layout.Encode(key, record)
		if err != nil {
			return err
		}
		return tx.Bucket([]byte(bucket)).Put([]byte(key), value)
	})
}

func (s *store) del(t *testing.T, bucket string, key []byte) {
	t.Helper()
	s.in(t, func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucket)).Delete(key) })
}

func get[R any](t *testing.T, s *store, bucket, key string) (rec R) {
	t.Helper()
	s.in(t, func(tx *bolt.Tx) error {
		return layout.Decode(bucket, key, tx.Bucket([]byte(bucket)).Get([]byte(key)), &rec)
	})
	return rec
}

func (s *store) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

func (s *store) file(name string) string {
	return s.path(layout.LayerPath(s.layer), layout.TreeDir, name)
}

// breakages break one invariant each, by hand. more are the numbers that
// cannot but break with it.
func breakages() map[string]struct {
	do   func(t *testing.T, s *store)
	more []string
} {
	type b = struct {
		do   func(t *testing.T, s *store)
		more []string
	}
	edge := layout.Edge{Parent: layout.ImageNode("image"), Rel: layout.RelTarget}
	return map[string]b{
		"M1": {func(t *testing.T, s *store) {
			s.in(t, func(tx *bolt.Tx) error {
				return tx.Bucket([]byte(layout.BucketLeases)).Put([]byte("x"), []byte("1234{}"))
			})
		}, nil},
		"M2": {func(t *testing.T, s *store) {
			s.in(t, func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte(layout.BucketLeases)) })
		}, nil},
		"M3": {func(t *testing.T, s *store) { s.put(t, layout.BucketBlobs, "md5:1", layout.BlobRecord{}) }, nil},
		"B1": {func(t *testing.T, s *store) { must(t, os.Remove(s.path(layout.BlobPath(s.blob)))) }, nil},
		"B2": {func(t *testing.T, s *store) { must(t, os.Truncate(s.path(layout.BlobPath(s.blob)), 1)) }, []string{"B3"}},
		"B3": {func(t *testing.T, s *store) {
			must(t, os.WriteFile(s.path(layout.BlobPath(s.blob)), []byte("a blOb"), 0))
		}, nil},
		"B4": {func(t *testing.T, s *store) {
			must(t, os.WriteFile(s.path(layout.BlobPath(layout.BlobDigest(digest.FromString("stranger")))), nil, 0o444))
		}, nil},
		"B5": {func(t *testing.T, s *store) { must(t, os.Chmod(s.path(layout.BlobPath(s.blob)), 0o644)) }, nil},
		"L1": {func(t *testing.T, s *store) { must(t, os.RemoveAll(s.path(layout.LayerPath(s.layer), layout.TreeDir))) }, []string{"L4"}},
		"L2": {func(t *testing.T, s *store) { must(t, os.Mkdir(s.path(layout.LayersDir, "stranger"), 0o755)) }, nil},
		"L3": {func(t *testing.T, s *store) {
			l := get[layout.LayerRecord](t, s, layout.BucketLayers, string(s.layer))
			must(t, os.WriteFile(s.path(layout.BlobPath(l.Manifest)), bytes.Repeat([]byte{0xff}, 20), 0))
		}, []string{"B2", "B3"}},
		"L4": {func(t *testing.T, s *store) { must(t, os.WriteFile(s.file("d/extra"), nil, 0o644)) }, nil},
		"L5": {func(t *testing.T, s *store) {
			s.put(t, layout.BucketLayerKeys, "diff:sha256:1", layout.LayerID("nobody"))
		}, nil},
		"L6": {func(t *testing.T, s *store) {
			l := get[layout.LayerRecord](t, s, layout.BucketLayers, string(s.layer))
			l.Size++
			s.put(t, layout.BucketLayers, string(s.layer), l)
		}, nil},
		"S1": {func(t *testing.T, s *store) {
			r := get[layout.SnapshotRecord](t, s, layout.BucketSnapshots, "active")
			r.Parent = "nobody"
			s.put(t, layout.BucketSnapshots, "active", r)
		}, []string{"E3"}},
		"S2": {func(t *testing.T, s *store) {
			r := get[layout.SnapshotRecord](t, s, layout.BucketSnapshots, "base")
			r.Layer = "nobody"
			s.put(t, layout.BucketSnapshots, "base", r)
		}, []string{"E3"}},
		"S3": {func(t *testing.T, s *store) {
			must(t, os.RemoveAll(s.path(layout.ActivePath(s.active), layout.TreeDir)))
		}, nil},
		"S4": {func(t *testing.T, s *store) { must(t, os.Mkdir(s.path(layout.ActiveDir, "stranger"), 0o755)) }, nil},
		"I1": {func(t *testing.T, s *store) {
			s.put(t, layout.BucketImages, "image", layout.ImageRecord{Target: ocispec.Descriptor{Digest: digest.FromString("nothing")}})
		}, []string{"E3"}},
		"I2": {func(t *testing.T, s *store) {
			s.del(t, layout.BucketBlobs, []byte(s.config))
			must(t, os.Remove(s.path(layout.BlobPath(s.config))))
		}, []string{"E2"}},
		"I3": {func(t *testing.T, s *store) {
			l := get[layout.LayerRecord](t, s, layout.BucketLayers, string(s.layer))
			l.DiffID = layout.DiffID(digest.FromString("another stream"))
			s.put(t, layout.BucketLayers, string(s.layer), l)
			s.put(t, layout.BucketLayerKeys, l.Key(), s.layer)
		}, nil},
		"E1": {func(t *testing.T, s *store) {
			e := edge
			e.Child = layout.BlobNode(s.manifest)
			s.del(t, layout.BucketEdgesBack, e.BackKey())
		}, nil},
		"E2": {func(t *testing.T, s *store) {
			e := layout.Edge{Parent: layout.LeaseNode("nobody"), Rel: layout.RelHolds, Child: layout.BlobNode(s.blob)}
			s.in(t, func(tx *bolt.Tx) error {
				return errors.Join(tx.Bucket([]byte(layout.BucketEdges)).Put(e.Key(), nil), tx.Bucket([]byte(layout.BucketEdgesBack)).Put(e.BackKey(), nil))
			})
		}, nil},
		"E3": {func(t *testing.T, s *store) {
			e := edge
			e.Child = layout.BlobNode(s.manifest)
			s.del(t, layout.BucketEdges, e.Key())
			s.del(t, layout.BucketEdgesBack, e.BackKey())
		}, nil},
		"E4": {func(t *testing.T, s *store) {
			d := digest.FromString("x")
			must(t, os.WriteFile(s.path(layout.BlobPath(layout.BlobDigest(d))), []byte("x"), 0o444))
			s.put(t, layout.BucketBlobs, d.String(), layout.BlobRecord{Size: 1})
		}, nil},
		"T2": {func(t *testing.T, s *store) {
			s.put(t, layout.BucketSweeps, "x", layout.SweepRecord{Path: "../outside", Node: layout.LayerNode("gone")})
		}, nil},
		"G1": {func(t *testing.T, s *store) { must(t, os.Mkdir(s.path(layout.StagingDir, "another-boot"), 0o700)) }, nil},
		"G2": {func(t *testing.T, s *store) {
			must(t, os.Mkdir(s.path(layout.StagingDir, "boot"), 0o700))
			must(t, os.Rename(s.path(layout.LayerPath(s.layer)), s.path(layout.StagingDir, "boot", string(s.layer))))
		}, []string{"G1", "L1", "L4"}},
		"J1": {func(t *testing.T, s *store) {
			s.put(t, layout.BucketIntents, "x", layout.IntentRecord{Purpose: "half done"})
		}, nil},
		"N1": {func(t *testing.T, s *store) {
			must(t, os.Mkdir(s.path(layout.IngestDir, "x"), 0o700))
			must(t, os.WriteFile(s.path(layout.IngestDir, "x", layout.IngestInfo), []byte("{torn"), 0o600))
		}, nil},
		"C1": {func(t *testing.T, s *store) { must(t, os.RemoveAll(s.path(layout.ContainerPath("cafe")))) }, nil},
		"C2": {func(t *testing.T, s *store) { must(t, os.Mkdir(s.path(layout.ContainersDir, "stranger"), 0o700)) }, nil},
		"K1": {func(t *testing.T, s *store) {
			r := get[layout.CacheRecord](t, s, layout.BucketCache, "known")
			r.LastUse = r.LastUse.Add(time.Hour)
			s.put(t, layout.BucketCache, "known", r)
		}, nil},
		"R1": {func(t *testing.T, s *store) { must(t, os.WriteFile(s.path("stranger"), nil, 0o600)) }, nil},
	}
}

// onlyOpen are the numbers that a closed store cannot break.
var onlyOpen = []string{"T1"}

func TestEveryInvariantIsChecked(t *testing.T) {
	all := breakages()
	for _, inv := range layout.Invariants() {
		if slices.Contains(onlyOpen, inv.ID) {
			continue
		}
		b, ok := all[inv.ID]
		if !ok {
			t.Errorf("%s is broken by no test", inv.ID)
			continue
		}
		t.Run(inv.ID, func(t *testing.T) {
			s := makeStore(t)
			if r := check(t, s.dir, layout.Deep); len(r.Findings) > 0 {
				t.Fatalf("before anything was broken: %+v", r.Findings)
			}
			b.do(t, s)
			r := check(t, s.dir, layout.Deep)
			want := append(slices.Clone(b.more), inv.ID)
			slices.Sort(want)
			if got := ids(r); !slices.Equal(got, want) {
				t.Errorf("found %v, want %v: %+v", got, want, r.Findings)
			}
		})
	}
}

// Every kind of difference between a tree and its manifest is seen.
func TestEveryAttributeIsCompared(t *testing.T) {
	for name, do := range map[string]func(s *store) error{
		"content": func(s *store) error {
			return keepTime(s.file("d/file"), func() error { return os.WriteFile(s.file("d/file"), []byte("cOntents"), 0) })
		},
		"missing":  func(s *store) error { return keepTime(s.file("."), func() error { return os.Remove(s.file("null")) }) },
		"mode":     func(s *store) error { return os.Chmod(s.file("d/file"), 0o600) },
		"owner":    func(s *store) error { return os.Lchown(s.file("link"), 5, 5) },
		"time":     func(s *store) error { return os.Chtimes(s.file("d"), time.Unix(1, 0), time.Unix(1, 1)) },
		"xattr":    func(s *store) error { return unix.Setxattr(s.file("d/file"), "user.colour", []byte("gray"), 0) },
		"new attr": func(s *store) error { return unix.Setxattr(s.file("d"), "user.new", nil, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			s := makeStore(t)
			must(t, do(s))
			if got := ids(check(t, s.dir, layout.Deep)); !slices.Equal(got, []string{"L4"}) {
				t.Errorf("found %v, want L4", got)
			}
		})
	}
}

// keepTime restores a file's time after fn has changed the file.
func keepTime(name string, fn func() error) error {
	fi, err := os.Lstat(name)
	if err != nil {
		return err
	}
	return errors.Join(fn(), os.Chtimes(name, fi.ModTime(), fi.ModTime()))
}

// A database with bits flipped anywhere ends in a report or an error.
func TestDamagedDatabaseIsAFinding(t *testing.T) {
	s := makeStore(t)
	path := s.path(layout.DatabaseFile)
	good, err := os.ReadFile(path)
	must(t, err)
	random := rand.New(rand.NewPCG(1, 2))
	seen := 0
	for range 150 {
		bad := bytes.Clone(good)
		for range 8 {
			bad[random.IntN(len(bad))] ^= 1 << random.IntN(8)
		}
		must(t, os.WriteFile(path, bad, 0o600))
		r, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Level: layout.Normal})
		if err != nil || r.ExitCode() != 0 {
			seen++
		}
	}
	t.Logf("150 damaged databases, %d seen as such", seen)
}

func TestWhatCannotBeChecked(t *testing.T) {
	if _, err := fsck.Run(t.Context(), fsck.Options{Root: "/no/such/store"}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("no store: %v", err)
	}
	s := makeStore(t)
	s.put(t, layout.BucketMeta, layout.MetaKey, layout.MetaRecord{Format: layout.FormatVersion + 1})
	if _, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir}); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "format") {
		t.Errorf("a newer format: %v", err)
	}
}
