package fsck_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/continuity/proto"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	pb "google.golang.org/protobuf/proto"

	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// store is one that has something of everything, made by hand: what the
// writers make is their tests' to hold against fsck.
type store struct {
	keepLog  bool // the change log is left as it is
	keepSums bool // and so are the sums and the state record
	keepBook bool // and the uses and accounts
	dir      string
	db       *bolt.DB // nil: closed

	blob, index, manifest, config, files layout.BlobDigest // files: base's file manifest
}

// base is a layer full of files, top an empty one on it.
const (
	baseLayer  layout.LayerID = "ba5e"
	topLayer   layout.LayerID = "709"
	activeTree layout.LayerID = "ac71"
	emptyTree  layout.LayerID = "e7977"
)

var (
	baseDiff = layout.DiffID(digest.FromString("base"))
	topDiff  = layout.DiffID(digest.FromString("top"))
	now      = time.Unix(1_700_000_000, 123456789).UTC()
)

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func makeStore(t *testing.T) *store {
	t.Helper()
	testkit.NeedRoot(t)
	s := &store{dir: t.TempDir()}
	for _, d := range layout.Dirs() {
		must(t, os.Mkdir(s.path(d.Path), 0o700), os.Chmod(s.path(d.Path), fs.FileMode(d.Perm)))
	}
	must(t, os.WriteFile(s.path("barrier"), nil, 0o600))
	s.in(t, func(tx *bolt.Tx) error {
		for _, b := range layout.Buckets() {
			if _, err := tx.CreateBucket([]byte(b)); err != nil {
				return err
			}
		}
		put(t, tx, layout.BucketMeta, layout.MetaKey, layout.MetaRecord{Format: layout.FormatVersion, ID: "id", Created: now})
		dir := s.path(layout.LayerPath(baseLayer), layout.TreeDir)
		must(t, os.MkdirAll(dir, 0o755), os.MkdirAll(s.path(layout.LayerPath(topLayer), layout.TreeDir), 0o755))
		fill(t, dir)
		s.files = s.addLayer(t, tx, baseLayer, baseDiff, [][]string{
			{"."}, {"d"}, {"d/file", "hard"}, {"d/other"}, {"fifo"}, {"link"}, {"null"}, {"suid"}, {"\xff\xfe"},
		})
		s.addLayer(t, tx, topLayer, topDiff, [][]string{{"."}})
		s.addImage(t, tx)
		s.addSnapshots(t, tx)
		s.addRest(t, tx)
		return nil
	})
	return s
}

func fill(t *testing.T, dir string) {
	at := func(name string) string { return filepath.Join(dir, name) }
	must(t,
		os.Mkdir(at("d"), 0o755),
		os.WriteFile(at("d/file"), []byte("contents"), 0o644),
		os.Link(at("d/file"), at("hard")),
		os.WriteFile(at("d/other"), []byte("contents"), 0o644),
		os.WriteFile(at("suid"), nil, 0o755), os.Chmod(at("suid"), 0o755|fs.ModeSetuid),
		os.Symlink("d/\xfffile", at("link")),
		os.WriteFile(at("\xff\xfe"), bytes.Repeat([]byte("x"), 5000), 0o600),
		unix.Mkfifo(at("fifo"), 0o600),
		unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Mknod(at("socket"), unix.S_IFSOCK|0o600, 0),
		unix.Setxattr(at("d/file"), "user.colour", []byte("grey"), 0),
		unix.Setxattr(at("d"), "trusted.overlay.opaque", []byte("y"), 0),
		unix.Setxattr(at("d"), "trusted.overlay.origin", []byte("not of the layer"), 0),
		os.Chtimes(at("d"), now, now),
	)
}

// addLayer records a tree, whose files come in the order of first names.
func (s *store) addLayer(t *testing.T, tx *bolt.Tx, id layout.LayerID, diff layout.DiffID, files [][]string) layout.BlobDigest {
	var m proto.Manifest
	rec := layout.LayerRecord{DiffID: diff, Created: now, Inodes: int64(len(files))}
	for _, names := range files {
		r := resource(t, s.path(layout.LayerPath(id), layout.TreeDir), names)
		m.Resource = append(m.Resource, r)
		switch mode := fs.FileMode(r.Mode); {
		case mode.IsDir():
			rec.Size += 4096
		case mode.IsRegular():
			rec.Size += (int64(r.Size) + 4095) &^ 4095
		}
	}
	data, err := pb.Marshal(&m)
	must(t, err)
	rec.Manifest = s.addBlob(t, tx, data)
	put(t, tx, layout.BucketLayers, string(id), rec)
	put(t, tx, layout.BucketLayerKeys, layout.DiffKey(diff), id)
	link(t, tx, layout.LayerNode(id), layout.RelFiles, layout.BlobNode(rec.Manifest))
	return rec.Manifest
}

func resource(t *testing.T, dir string, names []string) *proto.Resource {
	full := filepath.Join(dir, names[0])
	fi, err := os.Lstat(full)
	must(t, err)
	var st unix.Stat_t
	must(t, unix.Lstat(full, &st))
	r := &proto.Resource{Path: names, Uid: int64(st.Uid), Gid: int64(st.Gid), Mode: uint32(fi.Mode())}
	attr := func(name, value string) { r.Xattr = append(r.Xattr, &proto.XAttr{Name: name, Data: []byte(value)}) }
	switch {
	case fi.Mode().IsRegular():
		data, err := os.ReadFile(full)
		must(t, err)
		r.Size, r.Digest = uint64(len(data)), []string{digest.FromBytes(data).String()}
	case fi.Mode()&fs.ModeDevice != 0:
		r.Major, r.Minor = uint64(unix.Major(st.Rdev)), uint64(unix.Minor(st.Rdev))
	case fi.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(full)
		must(t, err)
		r.Target = strings.ToValidUTF8(target, "?")
		attr("varve.dev/target", target)
	}
	switch names[0] {
	case "d":
		attr("trusted.overlay.opaque", "y")
	case "d/file":
		attr("user.colour", "grey")
	case "\xff\xfe":
		r.Path = []string{"quoted"}
		attr("varve.dev/names", names[0])
	}
	attr("varve.dev/mtime", strconv.FormatInt(st.Mtim.Nano(), 10))
	return r
}

func (s *store) addBlob(t *testing.T, tx *bolt.Tx, data []byte) layout.BlobDigest {
	t.Helper()
	d := layout.BlobDigest(digest.FromBytes(data))
	must(t, os.WriteFile(s.path(layout.BlobPath(d)), data, 0o444))
	put(t, tx, layout.BucketBlobs, string(d), layout.BlobRecord{Size: int64(len(data)), Created: now})
	return d
}

func (s *store) addJSON(t *testing.T, tx *bolt.Tx, v any) layout.BlobDigest {
	data, err := json.Marshal(v)
	must(t, err)
	return s.addBlob(t, tx, data)
}

func descriptor(d layout.BlobDigest) ocispec.Descriptor {
	return ocispec.Descriptor{Digest: d.Digest()}
}

// addImage adds an index of two manifests, the second of which was never
// fetched; the blob of the second layer was dropped after it was unpacked.
func (s *store) addImage(t *testing.T, tx *bolt.Tx) {
	s.config = s.addJSON(t, tx, ocispec.Image{RootFS: ocispec.RootFS{DiffIDs: []digest.Digest{digest.Digest(baseDiff), digest.Digest(topDiff)}}})
	layer := s.addBlob(t, tx, []byte("a layer"))
	s.manifest = s.addJSON(t, tx, ocispec.Manifest{
		Config: descriptor(s.config), Layers: []ocispec.Descriptor{descriptor(layer), {Digest: digest.FromString("dropped")}},
	})
	s.index = s.addJSON(t, tx, ocispec.Index{Manifests: []ocispec.Descriptor{descriptor(s.manifest), {Digest: digest.FromString("never fetched")}}})
	put(t, tx, layout.BucketImages, "image", layout.ImageRecord{Target: descriptor(s.index)})
	link(t, tx, layout.ImageNode("image"), layout.RelTarget, layout.BlobNode(s.index))
	link(t, tx, layout.BlobNode(s.index), layout.RelContent, layout.BlobNode(s.manifest))
	link(t, tx, layout.BlobNode(s.manifest), layout.RelContent, layout.BlobNode(s.config))
	link(t, tx, layout.BlobNode(s.manifest), layout.RelContent, layout.BlobNode(layer))
	link(t, tx, layout.BlobNode(s.manifest), layout.RelUnpacked, layout.SnapshotNode("top"))
}

func (s *store) addSnapshots(t *testing.T, tx *bolt.Tx) {
	for key, rec := range map[layout.SnapshotKey]layout.SnapshotRecord{
		"base":   {Kind: layout.SnapshotCommitted, Layer: baseLayer},
		"top":    {Kind: layout.SnapshotCommitted, Layer: topLayer, Parent: "base"},
		"active": {Kind: layout.SnapshotActive, Layer: activeTree, Parent: "top"},
		"view":   {Kind: layout.SnapshotView, Parent: "top"},
		"empty":  {Kind: layout.SnapshotView, Layer: emptyTree},
	} {
		put(t, tx, layout.BucketSnapshots, string(key), rec)
		if rec.Parent != "" {
			link(t, tx, layout.SnapshotNode(key), layout.RelParent, layout.SnapshotNode(rec.Parent))
		}
		switch {
		case rec.Kind == layout.SnapshotCommitted:
			link(t, tx, layout.SnapshotNode(key), layout.RelTree, layout.LayerNode(rec.Layer))
		case rec.Layer != "":
			link(t, tx, layout.SnapshotNode(key), layout.RelTree, layout.ActiveNode(rec.Layer))
			must(t, os.MkdirAll(s.path(layout.ActivePath(rec.Layer), layout.TreeDir), 0o711), os.Mkdir(s.path(layout.ActivePath(rec.Layer), layout.WorkDir), 0o711))
		}
	}
	hold(t, tx, layout.SnapshotNode("view"))
	hold(t, tx, layout.SnapshotNode("empty"))
}

func (s *store) addRest(t *testing.T, tx *bolt.Tx) {
	s.blob = s.addBlob(t, tx, []byte("a blob"))
	put(t, tx, layout.BucketLeases, "lease", layout.LeaseRecord{Purpose: "test"})
	link(t, tx, layout.LeaseNode("lease"), layout.RelHolds, layout.BlobNode(s.blob))
	put(t, tx, layout.BucketContainers, "cafe", layout.ContainerRecord{Snapshot: "active"})
	link(t, tx, layout.ContainerNode("cafe"), layout.RelRootfs, layout.SnapshotNode("active"))
	put(t, tx, layout.BucketCache, "known", layout.CacheRecord{Snapshots: []layout.SnapshotKey{"base"}, LastUse: now})
	put(t, tx, layout.BucketCache, "alias", layout.CacheRecord{Alias: "known", LastUse: now})
	link(t, tx, layout.CacheNode("known"), layout.RelResult, layout.SnapshotNode("base"))
	use := binary.BigEndian.AppendUint64(nil, uint64(now.UnixNano()))
	uses := tx.Bucket([]byte(layout.BucketCacheByUse))
	put(t, tx, layout.BucketSweeps, "swept", layout.SweepRecord{Path: layout.LayerPath("gone"), Node: layout.LayerNode("gone"), Claimed: true})
	must(t,
		uses.Put([]byte(string(use)+"known"), nil), uses.Put([]byte(string(use)+"alias"), nil),
		os.Mkdir(s.path(layout.ContainerPath("cafe")), 0o700),
		os.WriteFile(s.path(layout.ContainerPath("cafe"), layout.ContainerConfig), []byte("{}"), 0o600),
		os.WriteFile(s.path(layout.ContainerPath("cafe"), layout.ContainerImage), []byte("{}"), 0o600),
		os.MkdirAll(s.path(layout.VolumesDir, "v", "_data"), 0o755),
		os.MkdirAll(s.path(layout.TrashPath("swept"), layout.TreeDir), 0o755),
		os.Mkdir(s.path(layout.IngestPath("half")), 0o700),
		os.WriteFile(s.path(layout.IngestPath("half"), layout.IngestData), []byte("hal"), 0o600),
		os.WriteFile(s.path(layout.IngestPath("half"), layout.IngestInfo), []byte(`{"ref":"r"}`), 0o600),
	)
}

// in changes the database by hand, and with it its sums and the change log.
func (s *store) in(t *testing.T, fn func(tx *bolt.Tx) error) {
	t.Helper()
	db := s.db
	if db == nil {
		var err error
		db, err = bolt.Open(s.path(layout.DatabaseFile), 0o600, &bolt.Options{NoSync: true})
		must(t, err)
		defer db.Close()
	}
	must(t, db.Update(func(tx *bolt.Tx) error {
		if err := fn(tx); err != nil {
			return err
		}
		if !s.keepBook && !s.keepSums {
			book(t, tx)
		}
		if !s.keepSums {
			sumUp(t, tx)
		}
		if s.keepLog {
			return nil
		}
		return os.WriteFile(s.path(layout.LogFile), logOf(t, tx), 0o600)
	}))
}

// sumUp makes M5 hold.
func sumUp(t *testing.T, tx *bolt.Tx) {
	t.Helper()
	var state layout.StateRecord
	if value := tx.Bucket([]byte(layout.BucketMeta)).Get([]byte(layout.StateKey)); value != nil {
		must(t, layout.Decode(layout.BucketMeta, layout.StateKey, value, &state))
	}
	state.Commit = uint64(tx.ID())
	put(t, tx, layout.BucketMeta, layout.StateKey, state)
	must(t, tx.ForEach(func(_ []byte, b *bolt.Bucket) error {
		sum := uint64(0)
		must(t, b.ForEach(func(k, v []byte) error { sum += layout.EntrySum(k, v); return nil }))
		return b.SetSequence(sum)
	}))
}

// book writes the uses and the accounts, going over everything until nothing
// changes.
func book(t *testing.T, tx *bolt.Tx) {
	t.Helper()
	if tx.Bucket([]byte(layout.BucketUses)) != nil {
		must(t, tx.DeleteBucket([]byte(layout.BucketUses)))
	}
	uses, err := tx.CreateBucket([]byte(layout.BucketUses))
	must(t, err)
	used := map[layout.Node]bool{}
	for again := true; again; {
		again = false
		must(t, tx.Bucket([]byte(layout.BucketEdges)).ForEach(func(k, _ []byte) error {
			e, err := layout.ParseEdge(k)
			if err != nil || !e.Parent.User() && !used[e.Parent] {
				return nil
			}
			again = again || !used[e.Child]
			used[e.Child] = true
			return uses.Put(k, nil)
		}))
	}
	state := layout.StateRecord{Accounts: layout.Accounts{}}
	for _, name := range layout.Buckets() {
		if b := tx.Bucket([]byte(name)); b != nil {
			must(t, b.ForEach(func(k, v []byte) error {
				account, u := layout.AccountOf(name, string(k), layout.Body(v))
				if account == "" {
					return nil
				}
				state.Accounts.Add(account, u)
				if spare := layout.SpareAccount(account); spare != "" && !used[layout.Node(strings.TrimSuffix(name, "s")+":"+string(k))] {
					state.Accounts.Add(spare, u)
				}
				return nil
			}))
		}
	}
	put(t, tx, layout.BucketMeta, layout.StateKey, state)
}

// logOf is a change log that begins with what the database holds.
func logOf(t *testing.T, tx *bolt.Tx) (log []byte) {
	t.Helper()
	var meta layout.MetaRecord
	must(t, layout.Decode(layout.BucketMeta, layout.MetaKey, tx.Bucket([]byte(layout.BucketMeta)).Get([]byte(layout.MetaKey)), &meta))
	rec := layout.ChangeRecord{Store: meta.ID}
	for _, name := range layout.LoggedBuckets() {
		b := tx.Bucket([]byte(name))
		must(t, b.ForEach(func(k, v []byte) error {
			value := []byte("true")
			if name != layout.BucketEdges {
				value = layout.Body(v)
			} else if e, err := layout.ParseEdge(k); err != nil || !layout.LoggedEdge(e) {
				return nil
			}
			if json.Valid(value) {
				rec.Changes = append(rec.Changes, layout.Change{Bucket: name, Key: string(k), Value: value})
			}
			return nil
		}))
	}
	line, err := layout.EncodeLine(rec)
	must(t, err)
	return line
}

// open opens the database as a daemon would.
func (s *store) open(t *testing.T) {
	t.Helper()
	var err error
	s.db, err = bolt.Open(s.path(layout.DatabaseFile), 0o600, &bolt.Options{NoSync: true})
	must(t, err)
	t.Cleanup(func() { s.db.Close() })
}

func put(t *testing.T, tx *bolt.Tx, bucket, key string, record any) {
	t.Helper()
	value, err := layout.Encode(key, record)
	must(t, err, tx.Bucket([]byte(bucket)).Put([]byte(key), value))
}

func link(t *testing.T, tx *bolt.Tx, parent layout.Node, rel string, child layout.Node) {
	t.Helper()
	e := layout.Edge{Parent: parent, Rel: rel, Child: child}
	must(t, tx.Bucket([]byte(layout.BucketEdges)).Put(e.Key(), nil), tx.Bucket([]byte(layout.BucketEdgesBack)).Put(e.BackKey(), nil))
}

func unlink(t *testing.T, tx *bolt.Tx, parent layout.Node, rel string, child layout.Node) {
	t.Helper()
	e := layout.Edge{Parent: parent, Rel: rel, Child: child}
	must(t, tx.Bucket([]byte(layout.BucketEdges)).Delete(e.Key()), tx.Bucket([]byte(layout.BucketEdgesBack)).Delete(e.BackKey()))
}

// hold keeps a node as containerd's API does.
func hold(t *testing.T, tx *bolt.Tx, n layout.Node) {
	t.Helper()
	link(t, tx, layout.ContainerdNode, layout.RelHolds, n)
}

// edit changes one record.
func edit[R any](t *testing.T, tx *bolt.Tx, bucket, key string, fn func(*R)) {
	t.Helper()
	var rec R
	must(t, layout.Decode(bucket, key, tx.Bucket([]byte(bucket)).Get([]byte(key)), &rec))
	fn(&rec)
	put(t, tx, bucket, key, rec)
}

func (s *store) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

func (s *store) file(name string) string {
	return s.path(layout.LayerPath(baseLayer), layout.TreeDir, name)
}
