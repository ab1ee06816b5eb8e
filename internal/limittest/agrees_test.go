package limittest

import (
	"context"
	"io/fs"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/internal/testkit"
)

// TestDfAgreesWithDu compares what df says of a store that has something of
// everything with what the file system says. The accounts take 4 KiB for each
// directory and each small file, which file systems may keep in their inodes or
// trees: they say more than there is by that at most. btrfs counts a block for each
// symbolic link, too, which it keeps in its trees. Without such options it is the
// same to the block on ext4.
func TestDfAgreesWithDu(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			testkit.NeedRoot(t)
			t.Setenv("VARVE_RUNTIME", filepath.Join(testkit.Binaries(t), "varve-runtime"))
			dir := filepath.Join(testkit.NewDisk(t, kind, 400).Dir, "store")
			e, err := daemon.Open(t.Context(), daemon.Options{Root: dir, State: t.TempDir()})
			must(t, err)
			defer e.Close(context.Background())
			base := load(t, e, testkit.Busybox(t))
			load(t, e, testkit.Stacked(t, 4, 200))
			_, err = build(t, e, base, 1, 0)
			must(t, err)
			_, err = e.Create(t.Context(), varve.CreateRequest{Image: base, Command: []string{"true"}}, nil)
			must(t, err)
			unix.Sync() // btrfs counts what it overwrites twice until it is written
			u, err := e.DiskUsage(t.Context(), varve.DiskUsageRequest{Measure: true})
			must(t, err)
			real, dirs, small, links := onDisk(dir)
			rounding, less := 4096*(dirs+small), int64(0)
			if kind == "btrfs" {
				less = 4096 * links
			}
			t.Logf("df says %d bytes, the file system %d: %+.4f of it, of at most %d for %d directories and %d small files",
				u.Total, real, float64(u.Total-real)/float64(real), rounding, dirs, small)
			if over := u.Total - real; over < -less || over > rounding {
				t.Errorf("df is off by %d bytes", over)
			}
		})
	}
}

// onDisk is what a store takes, as du counts it, with the directories and the
// files below a block that are in it, and the symbolic links.
func onDisk(dir string) (bytes, dirs, small, links int64) {
	bytes = taken(dir, "", func(fi fs.FileInfo) {
		switch {
		case fi.IsDir():
			dirs++
		case fi.Mode().Type() == fs.ModeSymlink:
			links++
		case fi.Size() < 4096:
			small++
		}
	})
	return bytes, dirs, small, links
}
