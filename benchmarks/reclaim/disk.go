package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// disk is a file system in a file, which takes what is written to it.
type disk struct {
	top string // has the file and the directory
	dir string // where it is mounted
}

// newDisk makes one with inodes for what is asked of it.
func newDisk(ctx context.Context, s settings) (*disk, error) {
	top, err := os.MkdirTemp(s.dir, "varve-reclaim-")
	if err != nil {
		return nil, err
	}
	d := &disk{top: top, dir: filepath.Join(top, "d")}
	file := filepath.Join(top, "file")
	inodes := max(2*s.files, s.containers*s.each) + 2_000_000
	steps := [][]string{{"truncate", "-s", "48G", file}}
	switch s.fs {
	case "ext4":
		// All that is written later is written now: no thread of the kernel's is
		// at it meanwhile.
		steps = append(steps, []string{"mkfs.ext4", "-q", "-F", "-N", fmt.Sprint(inodes), "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", file})
	case "xfs":
		steps = append(steps, []string{"mkfs.xfs", "-q", "-K", file})
	default:
		return nil, errors.Join(fmt.Errorf("-fs is ext4, xfs or none, not %s", s.fs), os.RemoveAll(top))
	}
	steps = append(steps, []string{"mount", "-o", "loop", file, d.dir})
	err = os.Mkdir(d.dir, 0o755)
	for _, args := range steps {
		if err == nil {
			_, err = output(ctx, nil, args...)
		}
	}
	if err != nil {
		return nil, errors.Join(err, d.end())
	}
	return d, nil
}

// end unmounts it, which frees its loop device, and deletes the file.
func (d *disk) end() error { return clearAway(d.top) }

// clearAway deletes a directory, and unmounts what is mounted in it. What stays
// mounted keeps the directory: deleting would go through the mount.
func clearAway(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m, 0); err != nil {
			return fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	return os.RemoveAll(dir)
}

// mountsBelow are the mounts in a directory, in the order in which they were made.
func mountsBelow(dir string) (all []string, err error) {
	data, err := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(data)) {
		if at := strings.Fields(line)[1]; strings.HasPrefix(at, dir+"/") {
			all = append(all, at)
		}
	}
	return all, err
}

// usedInodes is how many a file system has given out. That is what xfs can tell
// too, whose total goes with its free space.
func usedInodes(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0
	}
	return int64(st.Files - st.Ffree)
}

func freeInodes(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0
	}
	return int64(st.Ffree)
}

// flush has what was written on the disk before anything is timed.
func flush(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}
