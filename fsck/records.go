package fsck

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"varve.dev/errdefs"
	"varve.dev/fsck/pages"
	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

// records are the database in memory.
type records struct {
	blobs      map[layout.BlobDigest]layout.BlobRecord
	layers     map[layout.LayerID]layout.LayerRecord
	layerKeys  map[string]layout.LayerIDs
	snapshots  map[layout.SnapshotKey]layout.SnapshotRecord
	images     map[string]layout.ImageRecord
	containers map[layout.ContainerID]layout.ContainerRecord
	leases     map[layout.LeaseID]layout.LeaseRecord
	cache      map[string]layout.CacheRecord
	byUse      map[string][]time.Time
	edges      map[layout.Edge]bool // as stored child first
	back       map[layout.Edge]bool // as stored parent first
	intents    map[layout.IntentID]layout.IntentRecord
	sweeps     map[string]layout.SweepRecord
	measures   map[string]layout.MeasureRecord
	accounts   layout.Accounts
	inUse      map[layout.Node]bool // what images, containers and the APIs need
	uses       []string             // what is wrong with the book of that
	store      string               // its id
	seq        uint64               // number of the last change
	tail       map[string]layout.ChangeRecord
	logged     map[string]string // bucket + NUL + key → what the log must say of it

	// unreadable are records that are there and do not decode (M1). That
	// what they name seems to be named by nobody is not said again.
	unreadable map[string]bool // bucket + "/" + key
}

func newRecords() *records {
	return &records{
		blobs: map[layout.BlobDigest]layout.BlobRecord{}, layers: map[layout.LayerID]layout.LayerRecord{},
		layerKeys: map[string]layout.LayerIDs{}, snapshots: map[layout.SnapshotKey]layout.SnapshotRecord{},
		images: map[string]layout.ImageRecord{}, containers: map[layout.ContainerID]layout.ContainerRecord{},
		leases: map[layout.LeaseID]layout.LeaseRecord{}, cache: map[string]layout.CacheRecord{},
		byUse: map[string][]time.Time{}, edges: map[layout.Edge]bool{}, back: map[layout.Edge]bool{},
		intents: map[layout.IntentID]layout.IntentRecord{}, sweeps: map[string]layout.SweepRecord{},
		measures:   map[string]layout.MeasureRecord{},
		unreadable: map[string]bool{}, tail: map[string]layout.ChangeRecord{}, logged: map[string]string{},
	}
}

// damage is what reading the database came upon, by the number of the check.
type damage struct{ id, object, detail string }

const theDatabase = "database"

// damaged notes a finding of M1, M2, M3 or M5.
func (c *checker) damaged(id, object, format string, args ...any) {
	c.damage = append(c.damage, damage{id, object, fmt.Sprintf(format, args...)})
}

// reportDamage: M1, M2, M3, M5.
func (c *checker) reportDamage(id string, f found) {
	for _, d := range c.damage {
		if d.id == id {
			f(d.object, layout.DatabaseFile, "%s", d.detail)
		}
	}
}

// openTimeout is how long another process may take to let go of the database.
const openTimeout = 200 * time.Millisecond

// load reads the database into c.rec, which stays nil if that is too damaged
// to go on.
func (c *checker) load() (err error) {
	var file *os.File // bbolt leaves it open, and locked, if it panics
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			c.damaged("M1", theDatabase, "reading it ends in: %v", r)
			c.rec, c.db, err = nil, nil, nil
			if file != nil {
				file.Close()
			}
		}
	}()
	db := c.opts.DB
	if db == nil {
		if c.db, err = c.open(&file); c.db == nil {
			return err
		}
		db = c.db
	}
	rec := newRecords()
	if err := db.View(func(tx *bolt.Tx) error { return c.read(tx, rec) }); err != nil {
		return fmt.Errorf("database: %w", err)
	}
	c.rec = rec
	return nil
}

// closeDB lets others open the store again.
func (c *checker) closeDB() error {
	if c.db == nil {
		return nil
	}
	return c.db.Close()
}

// open opens the database of a closed store. Neither a database nor an error
// means that it cannot be read, which was noted.
func (c *checker) open(file **os.File) (*bolt.DB, error) {
	opened, err := reach.Regular(c.fd(), layout.DatabaseFile)
	switch {
	case errors.Is(err, fs.ErrNotExist) && c.used():
		c.damaged("M2", theDatabase, "it is missing")
		return nil, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("no %s: %w", layout.DatabaseFile, errdefs.ErrNotFound)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	case errors.Is(err, reach.ErrNotRegular):
		c.damaged("M2", theDatabase, "%v", err)
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	defer opened.Close()
	db, err := bolt.Open(c.path(layout.DatabaseFile), 0o600, &bolt.Options{
		ReadOnly: true, Timeout: openTimeout,
		OpenFile: func(string, int, fs.FileMode) (*os.File, error) {
			f, err := reach.Again(opened)
			*file = f
			return f, err
		},
	})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, errInUse
	case err != nil:
		c.damaged("M2", theDatabase, "%v", err)
		return nil, nil
	}
	if !c.inPlace(opened) {
		return nil, errors.Join(errInUse, db.Close())
	}
	// Under bbolt's lock, so that nobody writes meanwhile.
	err = pages.Walk(opened)
	if err != nil {
		c.damaged("M2", theDatabase, "%v", err)
	}
	if free := (*pages.FreeListError)(nil); err != nil && !errors.As(err, &free) {
		return nil, db.Close()
	}
	return db, nil
}

var errInUse = fmt.Errorf("another process has the store open: %w", errdefs.ErrUnavailable)

// inPlace tells whether the database's name still leads to the file whose lock has
// come: who has a store open puts another in its place when it compacts it.
func (c *checker) inPlace(opened *os.File) bool {
	mine, err := opened.Stat()
	if err != nil {
		return false
	}
	named, err := reach.Stat(c.fd(), layout.DatabaseFile)
	return err == nil && os.SameFile(mine, named)
}

// used tells whether the store is one that had a database: there is a change
// log, or what only a database can have led to.
func (c *checker) used() bool {
	if !c.gone(layout.LogFile) {
		return true
	}
	for dir, list := range c.dirs {
		switch dir {
		case ".", layout.BlobsDir, layout.BlobsDir + "/sha256", layout.IngestDir, layout.StagingDir, layout.TrashDir:
		default:
			if len(list) > 0 {
				return true
			}
		}
	}
	return false
}

// read copies every bucket.
func (c *checker) read(tx *bolt.Tx, rec *records) error {
	for _, name := range layout.Buckets() {
		if tx.Bucket([]byte(name)) == nil {
			c.damaged("M2", theDatabase, "bucket %s is missing", name)
		}
	}
	if err := c.readMeta(tx, rec); err != nil {
		return err
	}
	c.addUp(tx)
	readBucket(c, tx, rec, layout.BucketBlobs, rec.blobs, blobKey)
	readBucket(c, tx, rec, layout.BucketLayers, rec.layers, elementKey)
	readBucket(c, tx, rec, layout.BucketLayerKeys, rec.layerKeys, layerIndexKey)
	readBucket(c, tx, rec, layout.BucketSnapshots, rec.snapshots, nameKey)
	readBucket(c, tx, rec, layout.BucketImages, rec.images, nameKey)
	readBucket(c, tx, rec, layout.BucketContainers, rec.containers, elementKey)
	readBucket(c, tx, rec, layout.BucketLeases, rec.leases, nameKey)
	readBucket(c, tx, rec, layout.BucketCache, rec.cache, nameKey)
	readBucket(c, tx, rec, layout.BucketIntents, rec.intents, nameKey)
	readBucket(c, tx, rec, layout.BucketSweeps, rec.sweeps, elementKey)
	readBucket(c, tx, rec, layout.BucketMeasures, rec.measures, measureKey)
	readBucket(c, tx, rec, layout.BucketLogTail, rec.tail, elementKey)
	if c.asked("M4") {
		readLogged(tx, rec)
	}
	c.readKeys(tx, layout.BucketEdges, func(k []byte) error { return addEdge(rec.edges, k, layout.ParseEdge) })
	c.readKeys(tx, layout.BucketEdgesBack, func(k []byte) error { return addEdge(rec.back, k, layout.ParseBackEdge) })
	if c.asked("E5") || c.asked("A1") {
		c.readUses(tx, rec)
	}
	c.readKeys(tx, layout.BucketCacheByUse, func(k []byte) error {
		if len(k) < 9 {
			return errors.New("it is too short for a time and a key")
		}
		key := string(k[8:])
		rec.byUse[key] = append(rec.byUse[key], time.Unix(0, int64(binary.BigEndian.Uint64(k))))
		return nil
	})
	return nil
}

func (c *checker) readMeta(tx *bolt.Tx, rec *records) error {
	// One type for the three records of this bucket.
	type metaRecord struct {
		layout.MetaRecord
		layout.StateRecord
	}
	metas := map[string]metaRecord{}
	readBucket(c, tx, rec, layout.BucketMeta, metas, metaKey)
	meta, ok := metas[layout.MetaKey]
	rec.store, rec.seq, rec.accounts = meta.ID, metas[layout.StateKey].Change, metas[layout.StateKey].Accounts
	switch {
	case !ok && rec.unreadable[layout.BucketMeta+"/"+layout.MetaKey]: // M1
	case !ok:
		c.damaged("M2", theDatabase, "it has no store record")
	case meta.Format < 1:
		c.damaged("M2", theDatabase, "its format is %d", meta.Format)
	case meta.Format != layout.FormatVersion:
		return fmt.Errorf("the store has format %d, this varve checks %d: %w", meta.Format, layout.FormatVersion, errdefs.ErrFailedPrecondition)
	}
	if got := metas[layout.StateKey].Commit; got != uint64(tx.ID()) && !rec.unreadable[layout.BucketMeta+"/"+layout.StateKey] {
		c.damaged("M5", theDatabase, "its state record is of commit %d, its meta page of %d", got, tx.ID())
	}
	return nil
}

// addUp compares every bucket with its sum.
func (c *checker) addUp(tx *bolt.Tx) {
	for _, name := range layout.Buckets() {
		b := tx.Bucket([]byte(name))
		if b == nil {
			continue // M2
		}
		entries, sum := 0, uint64(0)
		_ = b.ForEach(func(k, v []byte) error {
			entries++
			sum += layout.EntrySum(k, v)
			return nil
		})
		if sum != b.Sequence() {
			c.damaged("M5", "bucket "+name, "its %d entries add up to %016x, not %016x", entries, sum, b.Sequence())
		}
	}
}

// readBucket copies the records of one bucket whose keys are valid.
func readBucket[K ~string, R any](c *checker, tx *bolt.Tx, rec *records, name string, into map[K]R, valid func(string) error) {
	b := tx.Bucket([]byte(name))
	if b == nil {
		return
	}
	_ = b.ForEach(func(k, v []byte) error {
		key := string(k)
		if err := valid(key); err != nil {
			c.damaged("M3", fmt.Sprintf("record %s/%q", name, key), "%v", err)
			return nil
		}
		var r R
		if err := layout.Decode(name, key, v, &r); err != nil {
			rec.unreadable[name+"/"+key] = true
			c.damaged("M1", fmt.Sprintf("record %s/%q", name, key), "%s", errdefs.AsCorrupt(err).Detail)
			return nil
		}
		into[K(key)] = r
		return nil
	})
}

// readKeys reads a bucket that has keys only.
func (c *checker) readKeys(tx *bolt.Tx, name string, add func([]byte) error) {
	b := tx.Bucket([]byte(name))
	if b == nil {
		return
	}
	_ = b.ForEach(func(k, _ []byte) error {
		if err := add(k); err != nil {
			c.damaged("M3", fmt.Sprintf("record %s/%q", name, k), "%v", err)
		}
		return nil
	})
}

func addEdge(into map[layout.Edge]bool, key []byte, parse func([]byte) (layout.Edge, error)) error {
	e, err := parse(key)
	if err == nil {
		err = validEdge(e)
	}
	if err == nil {
		into[e] = true
	}
	return err
}
