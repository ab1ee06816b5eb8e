package crashtest

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"varve.dev/internal/powercut"
)

const (
	plainFiles = 50
	plainSize  = 10000
)

// careless does what engines do today: it writes files, renames their folder
// into place and syncs only the record of it, in a file that has its blocks.
func careless(dir string, _ []string, mark func(string, ...any)) error {
	return plainWork(dir, mark, false)
}

// careful syncs what it writes, before the record.
func careful(dir string, _ []string, mark func(string, ...any)) error {
	return plainWork(dir, mark, true)
}

func plainWork(dir string, mark func(string, ...any), sync bool) error {
	db, err := os.Create(filepath.Join(dir, "db"))
	if err != nil {
		return err
	}
	defer db.Close()
	if _, err := db.Write(make([]byte, 4096)); err != nil {
		return err
	}
	if err := syncAll(db, dir); err != nil {
		return err
	}
	mark("opened")
	staging, final := filepath.Join(dir, "staging"), filepath.Join(dir, "final")
	if err := os.Mkdir(staging, 0o755); err != nil {
		return err
	}
	for i := range plainFiles {
		f, err := os.Create(filepath.Join(staging, fmt.Sprint(i)))
		if err != nil {
			return err
		}
		if _, err := f.Write(plainContents(i)); err != nil {
			return err
		}
		if sync {
			if err := f.Sync(); err != nil {
				return err
			}
		}
		f.Close()
	}
	if err := os.Rename(staging, final); err != nil {
		return err
	}
	if sync {
		if err := syncAll(nil, final, dir); err != nil {
			return err
		}
	}
	if _, err := db.WriteAt([]byte("recorded"), 0); err != nil {
		return err
	}
	if err := db.Sync(); err != nil {
		return err
	}
	mark("acknowledged")
	return nil
}

func plainContents(i int) []byte {
	data := make([]byte, plainSize)
	for j := range data {
		data[j] = byte(i + j + 1)
	}
	return data
}

func syncAll(f *os.File, dirs ...string) error {
	if f != nil {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	for _, dir := range dirs {
		d, err := os.Open(dir)
		if err != nil {
			return err
		}
		err = d.Sync()
		d.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// lost counts the files that are missing or wrong although they are recorded.
func lost(dir string) (n int) {
	record := make([]byte, 8)
	db, err := os.Open(filepath.Join(dir, "db"))
	if err != nil {
		return 0
	}
	defer db.Close()
	if _, err := db.ReadAt(record, 0); err != nil || string(record) != "recorded" {
		return 0
	}
	for i := range plainFiles {
		data, err := os.ReadFile(filepath.Join(dir, "final", fmt.Sprint(i)))
		if err != nil || string(data) != string(plainContents(i)) {
			n++
		}
	}
	return n
}

// TestTheRigSeesLoss holds the instrument against two workloads of which one
// is known to lose what it records, and the other not to.
func TestTheRigSeesLoss(t *testing.T) {
	for _, kind := range powercut.FileSystems() {
		t.Run(string(kind), func(t *testing.T) {
			rig := newRig(t)
			for _, role := range []string{"careless", "careful"} {
				rec, _ := record(t, rig, kind, diskSize(0), powercut.Worker{Role: role})
				cuts, losing, worst := rec.Choose(12, 1), 0, 0
				images := rec.Replay()
				for _, cut := range cuts {
					m, err := rig.Mount(kind, images.Image(cut))
					if err != nil {
						t.Fatalf("%s: %s: %v", role, cut, err)
					}
					n := lost(m.Dir)
					if n > 0 {
						losing++
					}
					worst = max(worst, n)
					if err := m.Unmount(); err != nil {
						t.Fatal(err)
					}
				}
				t.Logf("%s: %d of %d cuts lose recorded files, at worst %d of %d", role, losing, len(cuts), worst, plainFiles)
				if careful := role == "careful"; careful != (losing == 0) {
					t.Errorf("%s: %d cuts lose files", role, losing)
				}
			}
		})
	}
}
