package fsck_test

import (
	"cmp"
	"encoding/binary"
	"errors"
	"os"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/layout"
)

// outside are kinds of damage that somebody outside does, with all that is to
// be found of each: number, and path or object.
var outside = map[string]struct {
	do   func(t *testing.T, s *store)
	want func(s *store) []string
}{
	"blob of somebody": {
		func(t *testing.T, s *store) { must(t, os.Chown(s.path(layout.BlobPath(s.blob)), 1000, 0)) },
		func(s *store) []string { return []string{"B5 " + layout.BlobPath(s.blob)} },
	},
	"wrong manifest": {
		func(t *testing.T, s *store) { flipAt(t, s.path(layout.BlobPath(s.manifest)), 1) },
		func(s *store) []string { return []string{"B3 " + layout.BlobPath(s.manifest)} },
	},
	"wrong file manifest": {
		func(t *testing.T, s *store) { flipAt(t, s.path(layout.BlobPath(s.files)), 20) },
		func(s *store) []string { return []string{"B3 " + layout.BlobPath(s.files)} },
	},
	"beside the tree": {
		func(t *testing.T, s *store) { must(t, os.Mkdir(s.path(layout.LayerPath(topLayer), "work"), 0o755)) },
		func(*store) []string { return []string{"L2 layers/709/work"} },
	},
	"beside a writable tree": {
		func(t *testing.T, s *store) {
			must(t, os.WriteFile(s.path(layout.ActivePath(activeTree), "notes"), nil, 0o600))
		},
		func(*store) []string { return []string{"S4 active/ac71/notes"} },
	},
	"work is a link": {
		func(t *testing.T, s *store) {
			work := s.path(layout.ActivePath(activeTree), layout.WorkDir)
			must(t, os.Remove(work), os.Symlink("/", work))
		},
		func(*store) []string { return []string{"S3 active/ac71"} },
	},
	"torn config of a container": {
		func(t *testing.T, s *store) {
			must(t, os.WriteFile(s.path(layout.ContainerPath("cafe"), layout.ContainerConfig), []byte(`{"args":`), 0o600))
		},
		func(*store) []string { return []string{"C1 containers/cafe/config.json"} },
	},
	"a fifo for a container's image": {
		func(t *testing.T, s *store) {
			at := s.path(layout.ContainerPath("cafe"), layout.ContainerImage)
			must(t, os.Remove(at), unix.Mkfifo(at, 0o600))
		},
		func(*store) []string { return []string{"C1 containers/cafe/image.json"} },
	},
	"overlay marks": {
		func(t *testing.T, s *store) {
			must(t, unix.Setxattr(s.file("suid"), "trusted.overlay.metacopy", nil, 0), unix.Setxattr(s.file("d"), "trusted.overlay.redirect", []byte("/etc"), 0))
		},
		func(*store) []string { return []string{"L4 d", "L4 suid"} },
	},
	"one name is a copy": { // of two neither is the odd one
		func(t *testing.T, s *store) {
			times := s.times(t)
			times[s.file("hard")] = times[s.file("d/file")]
			must(t, os.Remove(s.file("hard")), os.WriteFile(s.file("hard"), []byte("cOntents"), 0o644))
			must(t, unix.Setxattr(s.file("hard"), "user.colour", []byte("grey"), 0))
			restore(times)
		},
		func(*store) []string { return []string{"L4 d/file", "L4 hard", "L4 hard"} },
	},
	"one of two names is gone": {
		func(t *testing.T, s *store) {
			times := s.times(t)
			must(t, os.Remove(s.file("d/file")))
			restore(times)
		},
		func(*store) []string { return []string{"L4 d/file"} },
	},
	"layers elsewhere": {
		func(t *testing.T, s *store) { displace(t, s, layout.LayersDir) },
		func(*store) []string { return []string{"L1 layers/709/fs", "L1 layers/ba5e/fs", "R2 layers"} },
	},
	"a shard elsewhere": {
		func(t *testing.T, s *store) { displace(t, s, path.Dir(layout.BlobPath(s.blob))) },
		func(s *store) []string {
			return []string{"B1 " + layout.BlobPath(s.blob), "R2 " + path.Dir(layout.BlobPath(s.blob))}
		},
	},
	"no volumes": {
		func(t *testing.T, s *store) { must(t, os.RemoveAll(s.path(layout.VolumesDir))) },
		func(*store) []string { return []string{"R2 volumes"} },
	},
	"trash of somebody": {
		func(t *testing.T, s *store) { must(t, os.Chown(s.path(layout.TrashDir), 1000, 0)) },
		func(*store) []string { return []string{"R2 trash"} },
	},
	"database for all": {
		func(t *testing.T, s *store) { must(t, os.Chmod(s.path(layout.DatabaseFile), 0o644)) },
		func(*store) []string { return []string{"R2 varve.db"} },
	},
	"database elsewhere": {
		func(t *testing.T, s *store) { displace(t, s, layout.DatabaseFile) },
		func(*store) []string { return []string{"M2 varve.db"} },
	},
	"neither database nor log": {
		func(t *testing.T, s *store) {
			must(t, os.Remove(s.path(layout.DatabaseFile)), os.Remove(s.path(layout.LogFile)))
		},
		func(*store) []string { return []string{"M2 varve.db"} },
	},
	"free list": {
		func(t *testing.T, s *store) { flipFree(t, s.path(layout.DatabaseFile)) },
		func(*store) []string { return []string{"M2 varve.db"} },
	},
	"type of an element": {
		func(t *testing.T, s *store) { flipType(t, s.path(layout.DatabaseFile)) },
		func(*store) []string { return []string{"M2 varve.db"} },
	},
	"a log of a terabyte": {
		func(t *testing.T, s *store) { must(t, os.Truncate(s.path(layout.LogFile), 1<<40)) },
		func(*store) []string { return []string{"M4 varve.log"} },
	},
	"sweeps of anything": {
		func(t *testing.T, s *store) {
			s.in(t, func(tx *bolt.Tx) error {
				put(t, tx, layout.BucketSweeps, "a", layout.SweepRecord{Path: layout.VolumesDir, Node: layout.LayerNode("gone")})
				put(t, tx, layout.BucketSweeps, "b", layout.SweepRecord{Path: "../elsewhere", Node: layout.LayerNode("../../elsewhere")})
				return nil
			})
		},
		func(*store) []string { return []string{"T2 ../elsewhere", "T2 volumes"} },
	},
	"edges that nothing calls for": {
		func(t *testing.T, s *store) {
			s.in(t, func(tx *bolt.Tx) error {
				link(t, tx, layout.ImageNode("image"), layout.RelTarget, layout.BlobNode(s.blob))
				link(t, tx, layout.BlobNode(s.manifest), layout.RelContent, layout.BlobNode(s.blob))
				return nil
			})
		},
		func(s *store) []string {
			return []string{"E3 -content-> blob:" + string(s.blob), "E3 -target-> blob:" + string(s.blob)}
		},
	},
	"a manifest that does not hold its config": {
		func(t *testing.T, s *store) {
			s.in(t, func(tx *bolt.Tx) error {
				unlink(t, tx, layout.BlobNode(s.manifest), layout.RelContent, layout.BlobNode(s.config))
				hold(t, tx, layout.BlobNode(s.config))
				return nil
			})
		},
		func(s *store) []string { return []string{"E3 -content-> blob:" + string(s.config)} },
	},
}

func TestDamageFromOutside(t *testing.T) {
	for name, c := range outside {
		t.Run(name, func(t *testing.T) {
			s := makeStore(t)
			c.do(t, s)
			var got []string
			for _, f := range s.check(t, layout.Deep).Findings {
				at := f.Path
				if at == "" { // an edge
					_, at, _ = strings.Cut(strings.ReplaceAll(f.Object, `"`, ""), " -")
					at = "-" + at
				}
				got = append(got, f.Invariant+" "+at)
			}
			slices.Sort(got)
			if want := c.want(s); !slices.Equal(got, want) {
				t.Errorf("found %q, want %q", got, want)
			}
		})
	}
}

// displace moves something out of the store and leaves a link to it.
func displace(t *testing.T, s *store, rel string) {
	t.Helper()
	to := path.Join(t.TempDir(), "moved")
	must(t, os.Rename(s.path(rel), to), os.Symlink(to, s.path(rel)))
}

func flipAt(t *testing.T, name string, at int64) {
	t.Helper()
	data, err := os.ReadFile(name)
	must(t, err)
	data[at] ^= 1
	must(t, os.WriteFile(name, data, 0))
}

// flipType gives the first element of a leaf page a type that there is not, which
// bbolt does not mind.
func flipType(t *testing.T, name string) {
	t.Helper()
	data, err := os.ReadFile(name)
	must(t, err)
	for at := 2 * 4096; at < len(data); at += 4096 {
		if page := data[at:]; binary.NativeEndian.Uint16(page[8:]) == 0x02 && binary.NativeEndian.Uint16(page[10:]) > 0 {
			page[16+1] ^= 0x10
		}
	}
	must(t, os.WriteFile(name, data, 0))
}

// flipFree makes the list of free pages of a database name another page.
func flipFree(t *testing.T, name string) {
	t.Helper()
	data, err := os.ReadFile(name)
	must(t, err)
	metas := [][]byte{data[16:], data[4096+16:]}
	newer := slices.MaxFunc(metas, func(a, b []byte) int {
		return cmp.Compare(binary.NativeEndian.Uint64(a[48:]), binary.NativeEndian.Uint64(b[48:]))
	})
	list := binary.NativeEndian.Uint64(newer[32:]) * 4096
	if binary.NativeEndian.Uint16(data[list+10:]) == 0 {
		t.Fatal("no page is free")
	}
	data[list+16] ^= 1
	must(t, os.WriteFile(name, data, 0))
}

// A store that is being checked is not opened by somebody else meanwhile.
func TestClosedStoreStaysClosed(t *testing.T) {
	s := makeStore(t)
	var asked atomic.Bool
	_, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Level: layout.Deep, Progress: func(int64, int64) {
		asked.Store(true)
		if db, err := bolt.Open(s.path(layout.DatabaseFile), 0o600, &bolt.Options{Timeout: 1}); err == nil {
			t.Error("opened")
			db.Close()
		}
	}})
	must(t, err)
	if !asked.Load() {
		t.Error("nothing was read")
	}
	// Nor is anything made of a directory that is no store.
	empty := t.TempDir()
	if _, err := fsck.Run(t.Context(), fsck.Options{Root: empty}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("an empty directory: %v", err)
	}
}

// What opening a store has healed is told, and counts as found.
func TestReportOfBefore(t *testing.T) {
	s := makeStore(t)
	lost := layout.BlobPath(layout.BlobDigest(digest.FromString("lost")))
	before := &fsck.Report{Findings: []fsck.Finding{{Invariant: "M1", Severity: layout.Loss, Object: "database"}, {Invariant: "B4", Severity: layout.Leak, Path: lost}}}
	r := s.check(t, layout.Quick)
	r.Findings = append(r.Findings, fsck.Finding{Invariant: "B4", Severity: layout.Leak, Path: lost})
	r.AddBefore(before)
	if len(r.Findings) != 2 || r.Findings[0].Healed || !r.Findings[1].Healed || r.ExitCode() != 1 {
		t.Errorf("exit code %d, %+v", r.ExitCode(), r.Findings)
	}
	r.AddLost([]string{"image x"})
	if r.ExitCode() != 2 || !strings.Contains(r.Findings[2].Detail, "image x") {
		t.Errorf("exit code %d, %+v", r.ExitCode(), r.Findings)
	}
}
