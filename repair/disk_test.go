package repair_test

import (
	"bytes"
	"crypto/rand"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"varve.dev/internal/testkit"
)

// What is on the disk counts, not what memory has of it: a check finds both
// when they differ, and the repair takes the good bytes from where they are.
func TestDiskAndMemory(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			disk := testkit.NewDisk(t, kind, 512)
			h := newHostAt(t, filepath.Join(disk.Dir, "root"))
			m, _ := stacked(t)
			for what, name := range map[string]string{"a file": h.find(t, victimFile), "a blob": h.blob(m.Layers[0].Digest.String())} {
				t.Run(what, func(t *testing.T) { h.diskAndMemory(t, disk, name, kind != "btrfs") })
			}
		})
	}
}

// diskAndMemory damages a file in memory, where the file system does not find
// bad blocks by itself, and then on the disk.
func (h *host) diskAndMemory(t *testing.T, disk testkit.Disk, name string, memory bool) {
	good, err := os.ReadFile(name)
	must(t, err)
	unix.Sync()
	block, bad := good[:page:page], make([]byte, page) // which is nowhere else on the disk
	rand.Read(bad)
	mixed := append(bytes.Clone(bad), good[page:]...)
	if memory {
		forget(t, name)
		disk.Change(t, block, bad)
		remember(t, name, mixed)
		disk.Change(t, bad, block)
		remember(t, name, mixed)
		r := h.repair(t)
		if h.whole(t, r); !strings.Contains(string(r.Plan), "in memory are other bytes") {
			t.Errorf("bad in memory: %s", r.Plan)
		}
	}
	remember(t, name, good)
	disk.Change(t, block, bad)
	remember(t, name, good)
	r := h.repair(t)
	from := "healed from " // a layer's blob, for a file
	if memory && strings.Contains(name, "/blobs/") {
		from += "memory"
	}
	if h.whole(t, r); !strings.Contains(r.Text, from) {
		t.Errorf("bad on the disk: %s", r.Text)
	}
	forget(t, name)
	remember(t, name, good)
}

// forget drops what memory has of a file.
func forget(t *testing.T, name string) {
	t.Helper()
	f, err := os.Open(name)
	must(t, err)
	must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	must(t, f.Close())
}

// remember has memory keep a file, and holds it against what it has to be
// there.
func remember(t *testing.T, name string, want []byte) {
	t.Helper()
	f, err := os.Open(name)
	must(t, err)
	got, err := io.ReadAll(f)
	must(t, err)
	must(t, f.Close())
	if !bytes.Equal(got, want) {
		t.Errorf("reading %s does not give what it should", filepath.Base(name))
	}
}
