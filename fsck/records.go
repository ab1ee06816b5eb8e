package fsck

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	bolt "go.etcd.io/bbolt"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// records are the database in memory.
type records struct {
	blobs      map[layout.BlobDigest]layout.BlobRecord
	layers     map[layout.LayerID]layout.LayerRecord
	layerKeys  map[string]layout.LayerID
	snapshots  map[layout.SnapshotKey]layout.SnapshotRecord
	images     map[string]layout.ImageRecord
	containers map[layout.ContainerID]layout.ContainerRecord
	leases     map[layout.LeaseID]layout.LeaseRecord
	cache      map[string]layout.CacheRecord
	byUse      map[string]time.Time
	edges      map[layout.Edge]bool // as stored child first
	back       map[layout.Edge]bool // as stored parent first
	intents    map[layout.IntentID]layout.IntentRecord
	sweeps     map[string]layout.SweepRecord
}

// openTimeout is how long another process may take to let go of the database.
const openTimeout = 200 * time.Millisecond

// load reads the database. nil records without an error mean that it is too
// damaged to go on, which is a finding by then.
func (c *check) load() (rec *records, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			c.found("M1", "database", layout.DatabaseFile, "reading it ends in %v", r)
			rec, err = nil, nil
		}
	}()
	db := c.opts.DB
	if db == nil {
		path := c.path(layout.DatabaseFile)
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("no %s: %w", layout.DatabaseFile, errdefs.ErrNotFound)
		}
		db, err = bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: openTimeout})
		if errors.Is(err, bolt.ErrTimeout) {
			return nil, fmt.Errorf("another process has the store open: %w", errdefs.ErrUnavailable)
		}
		if err != nil {
			c.found("M2", "database", layout.DatabaseFile, "%v", err)
			return nil, nil
		}
		defer db.Close()
	}
	rec = newRecords()
	err = db.View(func(tx *bolt.Tx) error { return c.read(tx, rec) })
	return rec, err
}

func newRecords() *records {
	return &records{
		blobs: map[layout.BlobDigest]layout.BlobRecord{}, layers: map[layout.LayerID]layout.LayerRecord{},
		layerKeys: map[string]layout.LayerID{}, snapshots: map[layout.SnapshotKey]layout.SnapshotRecord{},
		images: map[string]layout.ImageRecord{}, containers: map[layout.ContainerID]layout.ContainerRecord{},
		leases: map[layout.LeaseID]layout.LeaseRecord{}, cache: map[string]layout.CacheRecord{},
		byUse: map[string]time.Time{}, edges: map[layout.Edge]bool{}, back: map[layout.Edge]bool{},
		intents: map[layout.IntentID]layout.IntentRecord{}, sweeps: map[string]layout.SweepRecord{},
	}
}

// read copies every bucket, reporting what does not decode (M1 to M3).
func (c *check) read(tx *bolt.Tx, rec *records) error {
	for _, name := range layout.Buckets() {
		if tx.Bucket([]byte(name)) == nil {
			c.found("M2", "database", layout.DatabaseFile, "bucket %s is missing", name)
		}
	}
	metas := map[string]layout.MetaRecord{}
	readBucket(c, tx, layout.BucketMeta, metas, nil)
	meta, ok := metas[layout.MetaKey]
	switch {
	case !ok:
		c.found("M2", "database", layout.DatabaseFile, "it has no store record")
	case meta.Format > layout.FormatVersion:
		return fmt.Errorf("the store has format %d, this varve knows %d: %w", meta.Format, layout.FormatVersion, errdefs.ErrFailedPrecondition)
	}
	readBucket(c, tx, layout.BucketBlobs, rec.blobs, func(k string) error { _, err := layout.ParseBlobDigest(k); return err })
	readBucket(c, tx, layout.BucketLayers, rec.layers, checkElement)
	readBucket(c, tx, layout.BucketLayerKeys, rec.layerKeys, nil)
	readBucket(c, tx, layout.BucketSnapshots, rec.snapshots, nil)
	readBucket(c, tx, layout.BucketImages, rec.images, nil)
	readBucket(c, tx, layout.BucketContainers, rec.containers, checkElement)
	readBucket(c, tx, layout.BucketLeases, rec.leases, nil)
	readBucket(c, tx, layout.BucketCache, rec.cache, nil)
	readBucket(c, tx, layout.BucketIntents, rec.intents, nil)
	readBucket(c, tx, layout.BucketSweeps, rec.sweeps, checkElement)
	c.readEdges(tx, layout.BucketEdges, rec.edges, layout.ParseEdge)
	c.readEdges(tx, layout.BucketEdgesBack, rec.back, layout.ParseBackEdge)
	c.readUses(tx, rec)
	return nil
}

// checkElement refuses a key that is to be a name in a directory and is none.
func checkElement(key string) error {
	if key == "" || key != filepath.Base(key) || key == "." || key == ".." {
		return errors.New("it is no name of a file")
	}
	return nil
}

func readBucket[K ~string, R any](c *check, tx *bolt.Tx, name string, into map[K]R, valid func(string) error) {
	b := tx.Bucket([]byte(name))
	if b == nil {
		return
	}
	_ = b.ForEach(func(k, v []byte) error {
		if valid != nil {
			if err := valid(string(k)); err != nil {
				c.found("M3", fmt.Sprintf("record %s/%q", name, k), "", "%v", err)
				return nil
			}
		}
		var r R
		if err := layout.Decode(name, string(k), v, &r); err != nil {
			c.found("M1", fmt.Sprintf("record %s/%q", name, k), "", "%s", errdefs.AsCorrupt(err).Detail)
			return nil
		}
		into[K(k)] = r
		return nil
	})
}

func (c *check) readEdges(tx *bolt.Tx, name string, into map[layout.Edge]bool, parse func([]byte) (layout.Edge, error)) {
	b := tx.Bucket([]byte(name))
	if b == nil {
		return
	}
	_ = b.ForEach(func(k, _ []byte) error {
		e, err := parse(k)
		if err != nil {
			c.found("M3", fmt.Sprintf("record %s/%q", name, k), "", "%v", err)
			return nil
		}
		into[e] = true
		return nil
	})
}

func (c *check) readUses(tx *bolt.Tx, rec *records) {
	b := tx.Bucket([]byte(layout.BucketCacheByUse))
	if b == nil {
		return
	}
	_ = b.ForEach(func(k, _ []byte) error {
		if len(k) < 9 {
			c.found("M3", fmt.Sprintf("record %s/%q", layout.BucketCacheByUse, k), "", "it is too short for a time and a key")
			return nil
		}
		key := string(k[8:])
		if _, twice := rec.byUse[key]; twice {
			c.found("K1", fmt.Sprintf("cache %q", key), "", "it has two places by last use")
		}
		rec.byUse[key] = time.Unix(0, int64(binary.BigEndian.Uint64(k)))
		return nil
	})
}
