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

// Disk is a small ext4 of its own, mounted for one test.
type Disk struct {
	Dir  string // where it is mounted
	file string // what it is on
}

// Ext4 makes a disk of so many MiB, with options of mkfs.ext4.
func Ext4(t testing.TB, mib int, options ...string) Disk {
	t.Helper()
	NeedRoot(t)
	Need(t, "mkfs.ext4", "e2fsprogs")
	d := Disk{Dir: t.TempDir(), file: filepath.Join(t.TempDir(), "disk")}
	for _, args := range [][]string{
		{"truncate", "-s", fmt.Sprintf("%dM", mib), d.file},
		append(append([]string{"mkfs.ext4", "-q"}, options...), d.file),
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
	command(t, "sync", "-f", d.Dir)
	data, err := os.ReadFile(d.file)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(data, block)
	if at < 0 {
		t.Fatal("the disk does not have the block")
	}
	f, err := os.OpenFile(d.file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, len(block)), int64(at)); err != nil {
		t.Fatal(err)
	}
}

func command(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
}
