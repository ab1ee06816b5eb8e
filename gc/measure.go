package gc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// What containers and steps write is not in any record: it is looked at from
// time to time, and df says how long ago.

const (
	// measureEvery is how old a measure gets at least before it is made again.
	measureEvery = time.Minute
	// measureShare is the part of its time that whoever measures in the
	// background works: one in so many.
	measureShare = 20
)

// Measure looks at the directories that may have changed since they were looked
// at, and records what they take. It takes a share of the time only.
func (c *Collector) Measure(ctx context.Context) (int, error) {
	return c.measure(ctx, measureShare-1, measureEvery)
}

// MeasureAll looks at everything at once, but for what cannot have changed.
func (c *Collector) MeasureAll(ctx context.Context) (int, error) { return c.measure(ctx, 0, 0) }

// measure looks at what has no measure and at what may have changed and has one
// that is of some age, and rests after each for a multiple of the time that it
// took.
func (c *Collector) measure(ctx context.Context, rest, age time.Duration) (n int, err error) {
	now := time.Now()
	old, err := c.measures(ctx)
	if err != nil {
		return 0, err
	}
	owners, err := c.owners(ctx)
	if err != nil {
		return 0, err
	}
	idle := c.idle(owners, old)
	found := map[string]bool{}
	for _, dir := range layout.Measured() {
		entries, rerr := os.ReadDir(c.Root.Path(dir))
		if rerr != nil {
			err = errors.Join(err, rerr)
			continue
		}
		for _, e := range entries {
			rel := path.Join(dir, e.Name())
			found[rel] = true
			if rec, known := old[rel]; known && (idle[rel] || now.Sub(rec.When) < age) {
				continue
			}
			begin := time.Now()
			if merr := c.measureOne(ctx, rel, owners[rel]); merr != nil {
				err = errors.Join(err, merr)
				continue
			}
			n++
			select {
			case <-time.After(rest * time.Since(begin)):
			case <-ctx.Done():
				return n, ctx.Err()
			}
		}
	}
	return n, errors.Join(err, c.forgetMeasures(ctx, old, found))
}

// owners returns the containers' directories by what belongs to each: it itself,
// and the writable layer.
func (c *Collector) owners(ctx context.Context) (owners map[string]string, err error) {
	err = c.DB.View(ctx, func(tx *metadata.Tx) error {
		owners = map[string]string{}
		return tx.Containers().Each("", func(id layout.ContainerID, rec layout.ContainerRecord) error {
			dir := layout.ContainerPath(id)
			owners[dir] = dir
			snap, err := tx.Snapshots().Get(rec.Snapshot)
			if errors.Is(err, errdefs.ErrNotFound) {
				return nil // C1
			}
			owners[layout.ActivePath(snap.Layer)] = dir
			return err
		})
	})
	return owners, err
}

// idle returns the directories that nobody has written to since they were
// measured: those of containers that have not run since, cache mounts, which are
// measured when a step has used them, and what is in quarantine.
func (c *Collector) idle(owners map[string]string, old map[string]layout.MeasureRecord) map[string]bool {
	idle := map[string]bool{}
	for rel, rec := range old {
		switch dir, _ := path.Split(rel); {
		case dir == layout.CacheMountDir+"/", dir == layout.QuarantineDir+"/":
			idle[rel] = true
		case owners[rel] != "":
			idle[rel] = !rec.Running && c.restedSince(owners[rel], rec.When)
		}
	}
	return idle
}

// restedSince tells whether a container has not run since: its shim holds a lock
// while it lives, and sets its time when it begins.
func (c *Collector) restedSince(dir string, when time.Time) bool {
	fi, err := os.Lstat(c.Root.Path(path.Join(dir, layout.ContainerLock)))
	return err == nil && fi.ModTime().Before(when) && !c.runs(dir)
}

// runs tells whether a container's lock is held. It asks the kernel for the list
// of locks: trying the lock would keep a container from being started meanwhile.
// The inode alone tells which it is, since file systems differ in what they call
// their devices; to take another's for it costs no more than a look.
func (c *Collector) runs(dir string) bool {
	var st unix.Stat_t
	if unix.Lstat(c.Root.Path(path.Join(dir, layout.ContainerLock)), &st) != nil {
		return false
	}
	locks, err := os.ReadFile("/proc/locks")
	return err != nil || bytes.Contains(locks, fmt.Appendf(nil, ":%d 0 EOF", st.Ino))
}

func (c *Collector) measures(ctx context.Context) (all map[string]layout.MeasureRecord, err error) {
	err = c.DB.View(ctx, func(tx *metadata.Tx) error {
		all = map[string]layout.MeasureRecord{}
		return tx.Measures().Each("", func(rel string, rec layout.MeasureRecord) error {
			all[rel] = rec
			return nil
		})
	})
	return all, err
}

// measureOne looks at one directory. owner is that of the container that may
// write to it, if there is one.
func (c *Collector) measureOne(ctx context.Context, rel, owner string) error {
	rec := layout.MeasureRecord{When: time.Now().UTC(), Running: owner != "" && c.runs(owner)}
	var err error
	if rec.Bytes, rec.Inodes, err = diskUsage(ctx, c.Root.Path(rel)); err != nil {
		return err
	}
	return c.DB.Update(ctx, func(tx *metadata.Tx) error {
		if gone(tx, rel) {
			return nil // meanwhile, and its measure with it
		}
		return tx.Measures().Put(rel, rec)
	})
}

// gone tells whether a writable layer or a container's directory has been
// removed. Of others there is no record: who removes a cache mount waits until it
// is measured.
func gone(tx *metadata.Tx, rel string) bool {
	dir, name := path.Split(rel)
	switch dir {
	case layout.ActiveDir + "/":
		return !tx.Referenced(layout.ActiveNode(layout.LayerID(name)))
	case layout.ContainersDir + "/":
		id := layout.ContainerID(name)
		return !tx.Containers().Has(id) && !tx.Referenced(layout.ContainerNode(id))
	}
	return false
}

// forgetMeasures drops the records of directories that are not there any more.
func (c *Collector) forgetMeasures(ctx context.Context, old map[string]layout.MeasureRecord, found map[string]bool) error {
	var gone []string
	for rel := range old {
		if !found[rel] {
			gone = append(gone, rel)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	return c.DB.Update(ctx, func(tx *metadata.Tx) (err error) {
		for _, rel := range gone {
			err = errors.Join(err, tx.Measures().Delete(rel))
		}
		return err
	})
}

// diskUsage adds up what a tree takes of the disk, each inode once. What goes
// away meanwhile is left out; mounts are not entered.
func diskUsage(ctx context.Context, root string) (bytes, inodes int64, err error) {
	var top unix.Stat_t
	if err := unix.Lstat(root, &top); err != nil {
		return 0, 0, &fs.PathError{Op: "lstat", Path: root, Err: err}
	}
	seen := map[uint64]bool{} // of several names
	err = filepath.WalkDir(root, func(at string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(at, &st)
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case st.Dev != top.Dev && d.IsDir():
			return fs.SkipDir
		case st.Dev != top.Dev, seen[st.Ino]:
			return nil
		}
		if !d.IsDir() && st.Nlink > 1 {
			seen[st.Ino] = true
		}
		bytes += st.Blocks * 512
		inodes++
		return nil
	})
	return bytes, inodes, err
}
