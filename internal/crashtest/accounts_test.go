package crashtest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sync"
	"unsafe"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/layer"
	"varve.dev/layout"
)

// records are what the database of a closed store says, read without package
// metadata.
type records struct {
	blobs      map[string]layout.BlobRecord
	layers     map[string]layout.LayerRecord
	snapshots  map[string]layout.SnapshotRecord
	containers map[string]layout.ContainerRecord
	leases     map[string]layout.LeaseRecord
	intents    map[string]layout.IntentRecord
	sweeps     map[string]layout.SweepRecord
}

func readRecords(dir string) (r records, err error) {
	db, err := bolt.Open(filepath.Join(dir, layout.DatabaseFile), 0, &bolt.Options{ReadOnly: true, Timeout: 1})
	if err != nil {
		return r, fmt.Errorf("the database of a closed store: %w", err)
	}
	defer db.Close()
	err = db.View(func(tx *bolt.Tx) error {
		return errors.Join(
			rows(tx, layout.BucketBlobs, &r.blobs), rows(tx, layout.BucketLayers, &r.layers),
			rows(tx, layout.BucketSnapshots, &r.snapshots), rows(tx, layout.BucketContainers, &r.containers),
			rows(tx, layout.BucketLeases, &r.leases), rows(tx, layout.BucketIntents, &r.intents), rows(tx, layout.BucketSweeps, &r.sweeps),
		)
	})
	return r, err
}

func rows[R any](tx *bolt.Tx, bucket string, out *map[string]R) error {
	*out = map[string]R{}
	return tx.Bucket([]byte(bucket)).ForEach(func(k, v []byte) error {
		var rec R
		err := layout.Decode(bucket, string(k), v, &rec)
		(*out)[string(k)] = rec
		return err
	})
}

// block is what ext4 and the others round a file to.
const block = 4096

func blocks(size int64) int64 { return (size + block - 1) / block * block }

// account is what a store says that it takes of the disk. What du finds lies
// between bytes and bytes+rounding.
type account struct{ bytes, rounding int64 }

func (a *account) add(bytes int64) { a.bytes += bytes }

// gap is by how much du and the accounts differed, in all looks together.
type gap struct {
	mu             sync.Mutex
	looks          int
	most, rounding int64
}

func (g *gap) note(du int64, a account) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.looks++
	g.most, g.rounding = max(g.most, du-a.bytes), max(g.rounding, a.rounding)
}

func (g *gap) String() string {
	return fmt.Sprintf("at most %d bytes beyond the accounts in %d looks (rounding allows %d)", g.most, g.looks, g.rounding)
}

// accountOf sums up the records of a closed store: a blob by its size, a
// layer by its recorded size and one block for the directory that its tree
// stands in. What no record gives a size is measured where it is named: the
// directories of the format, the database and its log, unfinished blobs, and
// what is the users' (writable layers, containers, volumes, cache mounts).
func accountOf(dir string, r records) (a account, err error) {
	for d, rec := range r.blobs {
		a.add(blocks(rec.Size))
		a.rounding += pieces(filepath.Join(dir, layout.BlobPath(layout.BlobDigest(d))), rec.Size)
	}
	for id, rec := range r.layers {
		a.add(rec.Size + block)
		slack, ferr := roundingOf(dir, layout.LayerID(id), rec)
		if ferr != nil {
			return a, fmt.Errorf("layer %s: %w", id, ferr)
		}
		a.rounding += slack
	}
	var measured []string
	for _, rec := range r.snapshots {
		if rec.Kind != layout.SnapshotCommitted && rec.Layer != "" {
			measured = append(measured, layout.ActivePath(rec.Layer))
		}
	}
	for id := range r.containers {
		measured = append(measured, layout.ContainerPath(layout.ContainerID(id)))
	}
	for _, d := range []string{layout.IngestDir, layout.VolumesDir, layout.CacheMountDir} {
		entries, err := os.ReadDir(filepath.Join(dir, d))
		if err != nil {
			return a, err
		}
		for _, e := range entries {
			measured = append(measured, path.Join(d, e.Name()))
		}
	}
	for _, name := range measured {
		n, err := du(filepath.Join(dir, name))
		if err != nil {
			return a, err
		}
		a.add(n)
	}
	names := []string{".", layout.DatabaseFile, layout.LogFile, durable.MarkerName}
	for _, d := range layout.Dirs() {
		names = append(names, d.Path)
	}
	for _, name := range names {
		n, err := blocksOf(filepath.Join(dir, name))
		if err != nil && !(name == durable.MarkerName && errors.Is(err, fs.ErrNotExist)) {
			return a, err
		}
		a.add(n)
	}
	return a, nil
}

// blocksOf is what a file or directory takes of the disk by itself.
func blocksOf(name string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return st.Blocks * 512, nil
}

// pieces is what a file may take beside its contents: a block that lists its
// extents, where there are more than the four that an inode of ext4 holds.
func pieces(name string, size int64) int64 {
	const inInode = 4
	if size <= inInode*block {
		return 0
	}
	f, err := os.Open(name)
	if err != nil {
		return 0
	}
	defer f.Close()
	// struct fiemap: start, length, flags, mapped extents, extent count, reserved.
	var request struct {
		start, length                  uint64
		flags, mapped, count, reserved uint32
	}
	request.length = uint64(size)
	const fiemap = 0xc020660b
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fiemap, uintptr(unsafe.Pointer(&request)))
	if errno == 0 && request.mapped <= inInode {
		return 0
	}
	return block
}

// roundingOf is what the tree of a layer may take beyond its recorded size,
// which counts the blocks of regular files and one for each directory: further
// blocks of a directory with many names, one for a long link, one for the
// xattrs that an inode has no room for, and those that list a file's extents.
func roundingOf(dir string, id layout.LayerID, rec layout.LayerRecord) (over int64, err error) {
	f, err := os.Open(filepath.Join(dir, layout.BlobPath(rec.Manifest)))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	m, err := layer.Decode(f)
	if err != nil {
		return 0, err
	}
	const linkInInode, xattrsInInode = 60, 88
	tree := filepath.Join(dir, layout.LayerPath(id), layout.TreeDir)
	names := map[string]int64{} // directory → bytes of its names
	for _, e := range m.Entries {
		for _, n := range e.Names {
			names[path.Dir(n)] += int64(len(n)) + 12
		}
		xattrs := 0
		for name, value := range e.Xattrs {
			xattrs += 16 + (len(name)+3)/4*4 + (len(value)+3)/4*4
		}
		if xattrs > xattrsInInode {
			over += block
		}
		switch e.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			over += pieces(filepath.Join(tree, e.Names[0]), e.Size)
		case unix.S_IFLNK:
			if len(e.Target) >= linkInInode {
				over += block
			}
		}
	}
	for _, n := range names {
		// A full block that is split leaves two half full ones, and an
		// index of them.
		if n > block-64 {
			over += blocks(2*n) + block
		}
	}
	return over, nil
}

// du is what everything below a name takes of the disk, itself included; of a
// hard link once.
func du(name string) (bytes int64, err error) {
	seen := map[uint64]bool{}
	err = filepath.WalkDir(name, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		if !seen[st.Ino] {
			seen[st.Ino] = true
			bytes += st.Blocks * 512
		}
		return nil
	})
	return bytes, err
}
