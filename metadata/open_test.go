package metadata

import (
	"fmt"
	"os"
	"testing"

	"varve.dev/layout"
)

// Opening a database reads all of it up to 16 MiB, and of a larger one the
// branch pages, the free list and the end of the log.
func TestOpeningALargeDatabase(t *testing.T) {
	const limit = maxPagesRead * 4096
	dir := t.TempDir()
	small := openingReads(t, dir, 5000)
	large := openingReads(t, dir, 80_000)
	t.Logf("read when opened: %v; %v", small, large)
	if small.size > limit || small.read < small.size/2 {
		t.Errorf("of a small database %v", small)
	}
	if large.size <= limit || large.read > large.size/20 {
		t.Errorf("of a large database %v", large)
	}
}

// opening is what was read of a database of some size.
type opening struct{ size, read int }

func (o opening) String() string { return fmt.Sprintf("%d of %d bytes", o.read, o.size) }

// openingReads puts records into the database in dir, and opens it.
func openingReads(t *testing.T, dir string, records int) (o opening) {
	t.Helper()
	root := openRoot(t, dir)
	put := func(db *DB, from, to int) {
		must(t, db.Update(t.Context(), func(tx *Tx) error {
			for i := from; i < to; i++ {
				if err := tx.Blobs().Put(digestOf(i), layout.BlobRecord{Size: int64(i), Origins: []string{"registry.example/some/name"}}); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	open := func() *DB {
		db, err := Open(root, Options{})
		must(t, err)
		return db
	}
	db := open()
	for from := 0; from < records; from += 5000 {
		put(db, from, from+5000)
	}
	must(t, db.log.sync())
	put(db, 0, 1) // a line that nobody syncs
	must(t, db.Close())
	db = open() // a log that has grown is written anew, once
	must(t, db.Close())
	before := bytesRead(t)
	db = open()
	o.read = bytesRead(t) - before
	fi, err := os.Stat(root.Path(layout.DatabaseFile))
	must(t, err)
	must(t, db.Close())
	o.size = int(fi.Size())
	return o
}

// bytesRead is how much this process has read by system calls.
func bytesRead(t *testing.T) (n int) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/io")
	must(t, err)
	_, err = fmt.Sscanf(string(data), "rchar: %d", &n)
	must(t, err)
	return n
}
