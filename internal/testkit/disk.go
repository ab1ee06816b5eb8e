package testkit

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Disk is a small file system of its own, mounted for one test.
type Disk struct {
	Dir  string // where it is mounted
	file string // what it is on
}

// packages have the programs that make file systems.
var packages = map[string]string{"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}

// Ext4 makes a disk of so many MiB, with options of mkfs.ext4.
func Ext4(t testing.TB, mib int, options ...string) Disk {
	t.Helper()
	return NewDisk(t, "ext4", mib, options...)
}

// NewDisk makes a disk of so many MiB with ext4, xfs or btrfs, of which the
// last two want 320, and options of mkfs.
func NewDisk(t testing.TB, kind string, mib int, options ...string) Disk {
	t.Helper()
	NeedRoot(t)
	Need(t, "mkfs."+kind, packages[kind])
	d := Disk{Dir: t.TempDir(), file: filepath.Join(t.TempDir(), "disk")}
	for _, args := range [][]string{
		{"truncate", "-s", fmt.Sprintf("%dM", mib), d.file},
		append(append([]string{"mkfs." + kind, "-q"}, options...), d.file),
		{"mount", "-o", "loop", d.file, d.Dir},
	} {
		command(t, args...)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(d.Dir, 0); err != nil {
			t.Error(err)
		}
	})
	return d
}

// Spoil writes zeros over the block that has these bytes, below the file
// system, which does not notice: as after a write that never came to the disk.
func (d Disk) Spoil(t testing.TB, block []byte) {
	t.Helper()
	d.Change(t, block, make([]byte, len(block)))
}

// Change writes other bytes over the first place on the disk that has these,
// below the file system, whose cache does not notice.
func (d Disk) Change(t testing.TB, from, to []byte) {
	t.Helper()
	command(t, "sync", "-f", d.Dir)
	data, err := os.ReadFile(d.file)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(data, from)
	if at < 0 {
		t.Fatal("the disk does not have the block")
	}
	f, err := os.OpenFile(d.file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(to, int64(at)); err != nil {
		t.Fatal(err)
	}
}

func command(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
}
