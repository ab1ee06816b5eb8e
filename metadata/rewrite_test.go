package metadata

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"varve.dev/layout"
)

// A log that is damaged is written anew while commits and syncs go on; it
// tells of all that was committed.
func TestRewriteLog(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(openRoot(t, dir), Options{})
	must(t, err)
	const writers, each = 4, 100
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for i := range each {
				doUpdate(t, db, func(tx *Tx) error {
					return tx.Blobs().Put(digestOf(w*each+i), layout.BlobRecord{Size: int64(i)})
				})
			}
		})
	}
	name := filepath.Join(dir, layout.LogFile)
	for range 20 {
		must(t, errors.Join(os.WriteFile(name, []byte("damaged"), 0o600), db.log.sync(), db.RewriteLog(t.Context())))
	}
	all.Wait()
	must(t, errors.Join(db.root.Poisoned(), db.Close(), os.Remove(filepath.Join(dir, layout.DatabaseFile))))
	r := newRebuilder(openRoot(t, dir))
	r.readLog()
	if got := len(r.state[layout.BucketBlobs]); got != writers*each || len(r.report.Lost) > 0 {
		t.Errorf("of %d records the log has %d: %v", writers*each, got, r.report.Lost)
	}
}
