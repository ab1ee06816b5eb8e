package fsck_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/layout"
)

func (s *store) check(t *testing.T, level layout.Level) *fsck.Report {
	t.Helper()
	opts := fsck.Options{Root: s.dir, Boot: "this-boot", Level: level}
	if s.db != nil {
		opts.DB = s.db
	}
	r, err := fsck.Run(t.Context(), opts)
	must(t, err)
	return r
}

// breakFunc breaks one invariant by hand, and nothing else.
type breakFunc func(t *testing.T, s *store, tx *bolt.Tx)

var breakages = map[string]breakFunc{
	"M1": func(t *testing.T, s *store, tx *bolt.Tx) {
		must(t, tx.Bucket([]byte(layout.BucketBlobs)).Put([]byte(s.blob), []byte("1234{}")))
	},
	"M2": func(t *testing.T, s *store, tx *bolt.Tx) { must(t, tx.DeleteBucket([]byte(layout.BucketSweeps))) },
	"M3": func(t *testing.T, s *store, tx *bolt.Tx) {
		put(t, tx, layout.BucketBlobs, "md5:1", layout.BlobRecord{})
	},
	"M4": func(t *testing.T, s *store, tx *bolt.Tx) {
		s.keepLog = true
		image := layout.Change{Bucket: layout.BucketImages, Key: "image"}
		line, err := layout.EncodeLine(layout.ChangeRecord{Changes: []layout.Change{image}})
		must(t, err, os.WriteFile(s.path(layout.LogFile), append(logOf(t, tx), line...), 0o600))
	},
	"M5": func(t *testing.T, s *store, tx *bolt.Tx) {
		s.keepSums = true
		book(t, tx)
		sumUp(t, tx)
		must(t, tx.Bucket([]byte(layout.BucketSweeps)).Delete([]byte("swept")))
	},
	"B1": func(t *testing.T, s *store, tx *bolt.Tx) { must(t, os.Remove(s.path(layout.BlobPath(s.files)))) },
	"B2": func(t *testing.T, s *store, tx *bolt.Tx) { must(t, os.Truncate(s.path(layout.BlobPath(s.files)), 1)) },
	"B3": func(t *testing.T, s *store, tx *bolt.Tx) {
		must(t, os.WriteFile(s.path(layout.BlobPath(s.blob)), []byte("a blOb"), 0))
	},
	"B4": func(t *testing.T, s *store, tx *bolt.Tx) {
		must(t, os.WriteFile(s.path(layout.BlobPath(layout.BlobDigest(digest.FromString("stranger")))), nil, 0o444))
	},
	"B5": func(t *testing.T, s *store, tx *bolt.Tx) { must(t, os.Chmod(s.path(layout.BlobPath(s.blob)), 0o644)) },
	"L1": func(t *testing.T, s *store, tx *bolt.Tx) { must(t, os.RemoveAll(s.file("."))) },
	"L2": func(t *testing.T, s *store, tx *bolt.Tx) {
		must(t, os.Mkdir(s.path(layout.LayersDir, "stranger"), 0o755))
	},
	"L3": func(t *testing.T, s *store, tx *bolt.Tx) {
		bad := s.addBlob(t, tx, []byte("no manifest"))
		link(t, tx, layout.LayerNode(baseLayer), layout.RelFiles, layout.BlobNode(bad))
		unlink(t, tx, layout.LayerNode(baseLayer), layout.RelFiles, layout.BlobNode(s.files))
		must(t, tx.Bucket([]byte(layout.BucketBlobs)).Delete([]byte(s.files)), os.Remove(s.path(layout.BlobPath(s.files))))
		edit(t, tx, layout.BucketLayers, string(baseLayer), func(r *layout.LayerRecord) { r.Manifest = bad })
	},
	"L4": func(t *testing.T, s *store, tx *bolt.Tx) { must(t, os.Chmod(s.file("d"), 0o700)) },
	"L5": func(t *testing.T, s *store, tx *bolt.Tx) {
		put(t, tx, layout.BucketLayerKeys, layout.DiffKey(layout.DiffID(digest.FromString("x"))), layout.LayerID("nobody"))
	},
	"L6": func(t *testing.T, s *store, tx *bolt.Tx) {
		edit(t, tx, layout.BucketLayers, string(baseLayer), func(r *layout.LayerRecord) { r.Inodes++ })
	},
	"S1": func(t *testing.T, s *store, tx *bolt.Tx) {
		edit(t, tx, layout.BucketSnapshots, "active", func(r *layout.SnapshotRecord) { r.Parent = "view" })
		unlink(t, tx, layout.SnapshotNode("active"), layout.RelParent, layout.SnapshotNode("top"))
		link(t, tx, layout.SnapshotNode("active"), layout.RelParent, layout.SnapshotNode("view"))
	},
	"S2": func(t *testing.T, s *store, tx *bolt.Tx) {
		edit(t, tx, layout.BucketSnapshots, "top", func(r *layout.SnapshotRecord) { r.Layer = "nobody" })
	},
	"S3": func(t *testing.T, s *store, tx *bolt.Tx) {
		must(t, os.RemoveAll(s.path(layout.ActivePath(activeTree), layout.TreeDir)))
	},
	"S4": func(t *testing.T, s *store, tx *bolt.Tx) {
		must(t, os.Mkdir(s.path(layout.ActiveDir, "stranger"), 0o755))
	},
	"I1": func(t *testing.T, s *store, tx *bolt.Tx) {
		put(t, tx, layout.BucketImages, "image", layout.ImageRecord{Target: ocispec.Descriptor{Digest: digest.FromString("nothing")}})
	},
	"I2": func(t *testing.T, s *store, tx *bolt.Tx) {
		must(t, tx.Bucket([]byte(layout.BucketBlobs)).Delete([]byte(s.config)), os.Remove(s.path(layout.BlobPath(s.config))))
		unlink(t, tx, layout.BlobNode(s.manifest), layout.RelContent, layout.BlobNode(s.config))
	},
	"I3": func(t *testing.T, s *store, tx *bolt.Tx) {
		other := layout.DiffID(digest.FromString("other"))
		edit(t, tx, layout.BucketLayers, string(baseLayer), func(r *layout.LayerRecord) { r.DiffID = other })
		put(t, tx, layout.BucketLayerKeys, layout.DiffKey(other), baseLayer)
		must(t, tx.Bucket([]byte(layout.BucketLayerKeys)).Delete([]byte(layout.DiffKey(baseDiff))))
	},
	"E1": func(t *testing.T, s *store, tx *bolt.Tx) {
		e := layout.Edge{Parent: layout.ImageNode("image"), Rel: layout.RelTarget, Child: layout.BlobNode(s.index)}
		must(t, tx.Bucket([]byte(layout.BucketEdges)).Delete(e.Key()))
	},
	"E2": func(t *testing.T, s *store, tx *bolt.Tx) {
		link(t, tx, layout.LeaseNode("nobody"), layout.RelHolds, layout.BlobNode(s.blob))
	},
	"E3": func(t *testing.T, s *store, tx *bolt.Tx) {
		unlink(t, tx, layout.CacheNode("known"), layout.RelResult, layout.SnapshotNode("base"))
	},
	"E4": func(t *testing.T, s *store, tx *bolt.Tx) { s.addBlob(t, tx, []byte("nobody's")) },
	"E5": func(t *testing.T, s *store, tx *bolt.Tx) {
		book(t, tx)
		s.keepBook = true
		e := layout.Edge{Parent: layout.ImageNode("image"), Rel: layout.RelTarget, Child: layout.BlobNode(s.index)}
		must(t, tx.Bucket([]byte(layout.BucketUses)).Delete(e.Key()))
	},
	"A1": func(t *testing.T, s *store, tx *bolt.Tx) {
		book(t, tx)
		s.keepBook = true
		edit(t, tx, layout.BucketMeta, layout.StateKey, func(r *layout.StateRecord) {
			r.Accounts.Add(layout.AccountSpareLayers, layout.Usage{Bytes: 4096})
		})
	},
	"T1": func(t *testing.T, s *store, tx *bolt.Tx) {
		must(t, os.Mkdir(s.path(layout.TrashPath("stranger")), 0o700))
	},
	"T2": func(t *testing.T, s *store, tx *bolt.Tx) {
		put(t, tx, layout.BucketSweeps, "x", layout.SweepRecord{Path: layout.LayerPath(topLayer), Node: layout.LayerNode(topLayer)})
	},
	"G1": func(t *testing.T, s *store, tx *bolt.Tx) {
		must(t, os.MkdirAll(s.path(layout.StagingPath("other", "x")), 0o700))
	},
	"G2": func(t *testing.T, s *store, tx *bolt.Tx) {
		must(t, os.Mkdir(s.path(layout.StagingDir, "other"), 0o700), os.Rename(s.path(layout.LayerPath(topLayer)), s.path(layout.StagingPath("other", topLayer))))
	},
	"J1": func(t *testing.T, s *store, tx *bolt.Tx) {
		put(t, tx, layout.BucketIntents, "x", layout.IntentRecord{Purpose: "half done"})
	},
	"N1": func(t *testing.T, s *store, tx *bolt.Tx) {
		must(t, os.WriteFile(s.path(layout.IngestPath("half"), layout.IngestInfo), []byte("{torn"), 0o600))
	},
	"C1": func(t *testing.T, s *store, tx *bolt.Tx) { must(t, os.RemoveAll(s.path(layout.ContainerPath("cafe")))) },
	"C2": func(t *testing.T, s *store, tx *bolt.Tx) {
		must(t, os.Mkdir(s.path(layout.ContainersDir, "stranger"), 0o700))
	},
	"K1": func(t *testing.T, s *store, tx *bolt.Tx) {
		edit(t, tx, layout.BucketCache, "known", func(r *layout.CacheRecord) { r.LastUse = now.Add(time.Hour) })
	},
	"R2": func(t *testing.T, s *store, tx *bolt.Tx) { must(t, os.Chmod(s.path(layout.LayersDir), 0o755)) },
	"R1": func(t *testing.T, s *store, tx *bolt.Tx) { must(t, os.WriteFile(s.path("stranger"), nil, 0o600)) },
}

// T1 can be broken in an open store only.
func TestEveryInvariantIsChecked(t *testing.T) {
	for _, inv := range layout.Invariants() {
		do, ok := breakages[inv.ID]
		if !ok {
			t.Errorf("%s is broken by no test", inv.ID)
			continue
		}
		t.Run(inv.ID, func(t *testing.T) {
			s := makeStore(t)
			if inv.ID == "T1" {
				s.open(t)
			}
			if r := s.check(t, layout.Deep); len(r.Findings) > 0 || r.ExitCode() != 0 {
				t.Fatalf("before anything was broken: %+v", r.Findings)
			}
			s.in(t, func(tx *bolt.Tx) error { do(t, s, tx); return nil })
			r := s.check(t, layout.Deep)
			if len(r.Findings) != 1 || r.Findings[0].Invariant != inv.ID {
				t.Errorf("found %+v", r.Findings)
			}
			// The level is the law's to say.
			if at := s.check(t, inv.Level); len(at.Findings) != 1 {
				t.Errorf("at its level %s: %+v", inv.Level, at.Findings)
			}
			if q := s.check(t, layout.Quick); inv.Level != layout.Quick && len(q.Findings) != 0 {
				t.Errorf("at level quick: %+v", q.Findings)
			}
			want := map[layout.Severity]int{layout.Loss: 2, layout.Damage: 1, layout.Leak: 1, layout.Notice: 0}[inv.Severity]
			if r.ExitCode() != want {
				t.Errorf("exit code %d, want %d", r.ExitCode(), want)
			}
		})
	}
	for id := range breakages {
		if _, ok := layout.FindInvariant(id); !ok {
			t.Errorf("%s is broken, and is no invariant", id)
		}
	}
}

// The state record is that of the last commit, and not of one before.
func TestStateOfAnotherCommit(t *testing.T) {
	s := makeStore(t)
	s.keepSums = true
	s.in(t, func(*bolt.Tx) error { return nil })
	if r := s.check(t, layout.Quick); len(r.Findings) != 1 || r.Findings[0].Invariant != "M5" {
		t.Errorf("found %+v", r.Findings)
	}
}

// Every kind of difference between a tree and its manifest is one finding of
// L4, or as many as files differ; links out of the tree are not followed.
func TestEveryAttributeIsCompared(t *testing.T) {
	for name, c := range map[string]struct {
		paths []string
		do    func(s *store) error
	}{
		"content": {[]string{"d/other"}, func(s *store) error { return os.WriteFile(s.file("d/other"), []byte("cOntents"), 0) }},
		"size":    {[]string{"d/other"}, func(s *store) error { return os.Truncate(s.file("d/other"), 3) }},
		"missing": {[]string{"null"}, func(s *store) error { return os.Remove(s.file("null")) }},
		"extra":   {[]string{"d/extra"}, func(s *store) error { return unix.Mkfifo(s.file("d/extra"), 0o600) }},
		"type": {[]string{"suid"}, func(s *store) error {
			return errors.Join(os.Remove(s.file("suid")), unix.Mkfifo(s.file("suid"), 0o755))
		}},
		"setuid":    {[]string{"suid"}, func(s *store) error { return os.Chmod(s.file("suid"), 0o755) }},
		"owner":     {[]string{"link"}, func(s *store) error { return os.Lchown(s.file("link"), 5, 5) }},
		"time":      {[]string{"d"}, func(s *store) error { return os.Chtimes(s.file("d"), now, now.Add(1)) }},
		"xattr":     {[]string{"d/file"}, func(s *store) error { return unix.Setxattr(s.file("hard"), "user.colour", []byte("gray"), 0) }},
		"new xattr": {[]string{"suid"}, func(s *store) error { return unix.Setxattr(s.file("suid"), "user.new", nil, 0) }},
		"device": {[]string{"null"}, func(s *store) error {
			return errors.Join(os.Remove(s.file("null")), unix.Mknod(s.file("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))))
		}},
		"target": {[]string{"link"}, func(s *store) error {
			return errors.Join(os.Remove(s.file("link")), os.Symlink("d/file", s.file("link")))
		}},
		"raw name": {[]string{"\xff\xfe"}, func(s *store) error { return os.Remove(s.file("\xff\xfe")) }},
		"joined": {[]string{"d/other", "suid"}, func(s *store) error {
			return errors.Join(os.Remove(s.file("suid")), os.Link(s.file("d/other"), s.file("suid")))
		}},
		"replaced by a link": {[]string{"d", "d/file", "d/other"}, func(s *store) error {
			return errors.Join(os.Rename(s.file("d"), s.path("volumes/d")), os.Symlink(s.path("volumes/d"), s.file("d")))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := makeStore(t)
			times := s.times(t)
			must(t, c.do(s))
			if name != "time" {
				restore(times)
			}
			got := map[string]bool{}
			for _, f := range s.check(t, layout.Deep).Findings {
				if f.Invariant != "L4" || f.Object != "layer "+string(baseLayer) {
					t.Errorf("%+v", f)
				}
				got[f.Path] = true
			}
			delete(got, "hard") // d/file's other name, missing with it or not
			have := slices.Sorted(maps.Keys(got))
			// Of two joined files the one that is come to second is said to be.
			joined := name == "joined" && len(have) > 0
			if !slices.Equal(have, c.paths) && !joined {
				t.Errorf("found %q, want %q", have, c.paths)
			}
		})
	}
}

func (s *store) times(t *testing.T) map[string]time.Time {
	out := map[string]time.Time{}
	must(t, filepath.WalkDir(s.file("."), func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err == nil {
			out[name] = fi.ModTime()
		}
		return err
	}))
	return out
}

// restore gives files that are still there their times back.
func restore(times map[string]time.Time) {
	for name, at := range times {
		spec := unix.NsecToTimespec(at.UnixNano())
		_ = unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{spec, spec}, unix.AT_SYMLINK_NOFOLLOW)
	}
}

// What an operation under way names is no finding while the store is open.
func TestUnderWay(t *testing.T) {
	s := makeStore(t)
	s.open(t)
	coming := layout.BlobDigest(digest.FromString("coming"))
	s.in(t, func(tx *bolt.Tx) error {
		put(t, tx, layout.BucketIntents, "x", layout.IntentRecord{
			Blobs:  []layout.BlobMove{{Digest: coming, From: "ingest/half/data"}},
			Layers: []layout.LayerMove{{ID: "new", From: layout.StagingPath("other", "new")}, {ID: "taken", From: layout.ActivePath("taken")}},
		})
		link(t, tx, layout.IntentNode("x"), layout.RelHolds, layout.ActiveNode("taken"))
		link(t, tx, layout.LeaseNode("lease"), layout.RelHolds, layout.LayerNode("leased"))
		return nil
	})
	must(t,
		os.WriteFile(s.path(layout.BlobPath(coming)), nil, 0o444), os.Mkdir(s.path(layout.LayerPath("leased")), 0o700),
		os.Mkdir(s.path(layout.LayerPath("taken")), 0o700),
		os.MkdirAll(s.path(layout.StagingPath("other", "new")), 0o700), os.MkdirAll(s.path(layout.StagingPath("this-boot", "x")), 0o700))
	if r := s.check(t, layout.Deep); len(r.Findings) > 0 {
		t.Errorf("%+v", r.Findings)
	}
}

// Whoever has a store open may put another file in its database's place. A check
// that waited for the old one's lock knows that the store is in use.
func TestDatabaseThatIsExchanged(t *testing.T) {
	s := makeStore(t)
	path := s.path(layout.DatabaseFile)
	locked := func(name string) *os.File {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		must(t, err, unix.Flock(int(f.Fd()), unix.LOCK_EX))
		t.Cleanup(func() { f.Close() })
		return f
	}
	old := locked(path)
	data, err := os.ReadFile(path)
	must(t, err, os.WriteFile(path+".new", data, 0o600))
	locked(path + ".new")
	checked := make(chan error)
	go func() {
		_, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir})
		checked <- err
	}()
	time.Sleep(20 * time.Millisecond) // until it waits
	must(t, os.Rename(path+".new", path), old.Close())
	if err := <-checked; !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("the check: %v", err)
	}
}

// A database with bits flipped anywhere ends in a report or an error.
func TestDamagedDatabaseIsAFinding(t *testing.T) {
	s := makeStore(t)
	path := s.path(layout.DatabaseFile)
	good, err := os.ReadFile(path)
	must(t, err)
	random, seen := rand.New(rand.NewPCG(1, 2)), 0
	for range 300 {
		bad := bytes.Clone(good)
		for range 8 {
			bad[random.IntN(len(bad))] ^= 1 << random.IntN(8)
		}
		must(t, os.WriteFile(path, bad, 0o600))
		r, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir})
		if err != nil || r.ExitCode() != 0 {
			seen++
		}
	}
	if seen == 0 {
		t.Error("no damage was seen")
	}
	t.Logf("300 damaged databases, %d seen as such", seen)
	for _, size := range []int64{0, 100, 5000, int64(len(good)) / 2} {
		must(t, os.WriteFile(path, good[:size], 0o600))
		r, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir})
		if err == nil && r.ExitCode() != 2 {
			t.Errorf("cut to %d bytes: %+v", size, r.Findings)
		}
	}
}

func TestWhatCannotBeChecked(t *testing.T) {
	if _, err := fsck.Run(t.Context(), fsck.Options{Root: "/no/such/store"}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("no store: %v", err)
	}
	s := makeStore(t)
	if _, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Online: true}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("online without a database: %v", err)
	}
	s.in(t, func(tx *bolt.Tx) error {
		put(t, tx, layout.BucketMeta, layout.MetaKey, layout.MetaRecord{Format: layout.FormatVersion + 1})
		return nil
	})
	if _, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("a newer format: %v", err)
	}
	s.open(t)
	if _, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir}); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("open elsewhere: %v", err)
	}
}

// TestRate has a check read no faster than it may, and be called off while it
// waits, which is no finding.
func TestRate(t *testing.T) {
	s := makeStore(t)
	s.in(t, func(tx *bolt.Tx) error {
		large := s.addBlob(t, tx, make([]byte, 1<<20))
		link(t, tx, layout.ImageNode("image"), layout.RelContent, layout.BlobNode(large))
		return nil
	})
	const rate = 2 << 20
	began := time.Now()
	report, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Level: layout.Deep, Rate: rate})
	must(t, err)
	const burst = 128 << 10 // which may be read at once
	if took, least := time.Since(began), time.Duration(report.Bytes-burst)*time.Second/rate; took < least || report.Bytes < 1<<20 {
		t.Errorf("%d bytes in %v, at least %v at %d a second", report.Bytes, took, least, rate)
	}
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := fsck.Run(soon, fsck.Options{Root: s.dir, Level: layout.Deep, Rate: 1 << 10}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("called off: %v", err)
	}
	if _, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Rate: -1}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a negative rate: %v", err)
	}
}
