package metadata

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	bolt "go.etcd.io/bbolt"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Tx is a transaction, valid only in the function it was handed to.
type Tx struct {
	bolt    *bolt.Tx
	h       *handle          // that it is of; nil in a database that is being made
	changes *[]layout.Change // for the log; nil in a view
	// accounts are those of the state record, with what this transaction has
	// changed; nil until they are asked for.
	accounts layout.Accounts
	trashed  int64    // bytes that it queues for the trash
	touched  *touched // what it changes is told to, while the database is compacted; else nil
}

// Table gives typed access to one bucket. R is a record of package layout.
type Table[K ~string, R any] struct {
	tx     *Tx
	bucket *bolt.Bucket
	name   string
}

func table[K ~string, R any](tx *Tx, bucket string) Table[K, R] {
	return Table[K, R]{tx: tx, bucket: tx.bolt.Bucket([]byte(bucket)), name: bucket}
}

// The tables.
func (tx *Tx) Blobs() Table[layout.BlobDigest, layout.BlobRecord] {
	return table[layout.BlobDigest, layout.BlobRecord](tx, layout.BucketBlobs)
}

// Layers may be read here; [Tx.PutLayer] writes them, with their index.
func (tx *Tx) Layers() Table[layout.LayerID, layout.LayerRecord] {
	return table[layout.LayerID, layout.LayerRecord](tx, layout.BucketLayers)
}

func (tx *Tx) Snapshots() Table[layout.SnapshotKey, layout.SnapshotRecord] {
	return table[layout.SnapshotKey, layout.SnapshotRecord](tx, layout.BucketSnapshots)
}

func (tx *Tx) Images() Table[string, layout.ImageRecord] {
	return table[string, layout.ImageRecord](tx, layout.BucketImages)
}

func (tx *Tx) Containers() Table[layout.ContainerID, layout.ContainerRecord] {
	return table[layout.ContainerID, layout.ContainerRecord](tx, layout.BucketContainers)
}

func (tx *Tx) Leases() Table[layout.LeaseID, layout.LeaseRecord] {
	return table[layout.LeaseID, layout.LeaseRecord](tx, layout.BucketLeases)
}

func (tx *Tx) Intents() Table[layout.IntentID, layout.IntentRecord] {
	return table[layout.IntentID, layout.IntentRecord](tx, layout.BucketIntents)
}

func (tx *Tx) Sweeps() Table[string, layout.SweepRecord] {
	return table[string, layout.SweepRecord](tx, layout.BucketSweeps)
}

func (tx *Tx) layerKeys() Table[string, layout.LayerIDs] {
	return table[string, layout.LayerIDs](tx, layout.BucketLayerKeys)
}

// Measures are what directories took of the disk when somebody looked.
func (tx *Tx) Measures() Table[string, layout.MeasureRecord] {
	return table[string, layout.MeasureRecord](tx, layout.BucketMeasures)
}

func (tx *Tx) metas() Table[string, layout.MetaRecord] {
	return table[string, layout.MetaRecord](tx, layout.BucketMeta)
}

func (tx *Tx) states() Table[string, layout.StateRecord] {
	return table[string, layout.StateRecord](tx, layout.BucketMeta)
}

func (tx *Tx) rebuilds() Table[string, layout.RebuiltRecord] {
	return table[string, layout.RebuiltRecord](tx, layout.BucketMeta)
}

// Checks are what is kept of deep checks, under the keys layout.CheckedKey,
// CheckingKey and ScrubbingKey.
func (tx *Tx) Checks() Table[string, layout.CheckRecord] {
	return table[string, layout.CheckRecord](tx, layout.BucketMeta)
}

// Rebuilt returns what is recorded of the last rebuilding of the database;
// nothing if it was never rebuilt.
func (tx *Tx) Rebuilt() (layout.RebuiltRecord, error) {
	rec, err := tx.rebuilds().Get(layout.RebuiltKey)
	if errors.Is(err, errdefs.ErrNotFound) {
		err = nil
	}
	return rec, err
}

// Get returns the record under key. Errors: ErrNotFound, Corrupt (M1).
func (t Table[K, R]) Get(key K) (R, error) {
	var rec R
	value := t.bucket.Get([]byte(key))
	if value == nil {
		return rec, fmt.Errorf("%s %q: %w", t.name, string(key), errdefs.ErrNotFound)
	}
	err := layout.Decode(t.name, string(key), value, &rec)
	return rec, err
}

// Has tells whether there is a record under key.
func (t Table[K, R]) Has(key K) bool { return t.bucket.Get([]byte(key)) != nil }

// Put stores the record under key, in place of what was there.
func (t Table[K, R]) Put(key K, rec R) error {
	if err := layout.CheckName("key in "+t.name, string(key)); err != nil {
		return err
	}
	value, err := layout.Encode(string(key), rec)
	if err != nil {
		return err
	}
	if err := t.tx.account(t.name, string(key), t.bucket.Get([]byte(key)), value); err != nil {
		return err
	}
	t.tx.note(t.name, string(key), layout.Body(value))
	return t.tx.put(t.name, []byte(key), value)
}

// Delete takes the record under key away; one that is not there is no error.
// Its edges are the caller's: see [Tx.Drop] for a record with all it holds.
func (t Table[K, R]) Delete(key K) error {
	if err := t.tx.account(t.name, string(key), t.bucket.Get([]byte(key)), nil); err != nil {
		return err
	}
	t.tx.note(t.name, string(key), nil)
	return t.tx.remove(t.name, []byte(key))
}

// Each calls fn for every record whose key begins with prefix, in the order
// of keys, until fn returns an error. fn must not change the table.
func (t Table[K, R]) Each(prefix string, fn func(K, R) error) error {
	return t.each(prefix, prefix, fn)
}

// EachFrom is Each for the records from key on, which need not exist.
func (t Table[K, R]) EachFrom(key string, fn func(K, R) error) error { return t.each(key, "", fn) }

func (t Table[K, R]) each(from, prefix string, fn func(K, R) error) error {
	c := t.bucket.Cursor()
	for k, v := c.Seek([]byte(from)); k != nil && bytes.HasPrefix(k, []byte(prefix)); k, v = c.Next() {
		var rec R
		if err := layout.Decode(t.name, string(k), v, &rec); err != nil {
			return err
		}
		if err := fn(K(k), rec); err != nil {
			return err
		}
	}
	return nil
}

// PutLayer stores a layer's record and its place in the index (L5).
func (tx *Tx) PutLayer(id layout.LayerID, rec layout.LayerRecord) error {
	if err := tx.Layers().Put(id, rec); err != nil {
		return err
	}
	key := rec.Key()
	if key == "" {
		return nil
	}
	ids, err := tx.layersOf(key)
	if err != nil || slices.Contains(ids, id) {
		return err
	}
	return tx.layerKeys().Put(key, append(ids, id))
}

// LayerByKey returns a layer with this key (layout.DiffKey, layout.ChainKey).
// Errors: ErrNotFound, Corrupt.
func (tx *Tx) LayerByKey(key string) (layout.LayerID, layout.LayerRecord, error) {
	ids, err := tx.layerKeys().Get(key)
	if err == nil && len(ids) == 0 {
		err = &errdefs.Corrupt{Invariant: "L5", Object: fmt.Sprintf("layer key %q", key), Detail: "it names no layer"}
	}
	if err != nil {
		return "", layout.LayerRecord{}, err
	}
	rec, err := tx.Layers().Get(ids[0])
	return ids[0], rec, err
}

// layersOf returns the layers that the index has under key.
func (tx *Tx) layersOf(key string) (layout.LayerIDs, error) {
	ids, err := tx.layerKeys().Get(key)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil, nil
	}
	return ids, err
}

// nameLayers makes ids the layers of a key.
func (tx *Tx) nameLayers(key string, ids layout.LayerIDs) error {
	if len(ids) == 0 {
		return tx.layerKeys().Delete(key)
	}
	return tx.layerKeys().Put(key, ids)
}

// dropLayerKey takes the layer's place in the index away, if it has it. An
// index entry that cannot be read is left to fsck.
func (tx *Tx) dropLayerKey(id layout.LayerID, rec layout.LayerRecord) error {
	key := rec.Key()
	ids, err := tx.layersOf(key)
	if err != nil || !slices.Contains(ids, id) {
		return nil
	}
	return tx.nameLayers(key, slices.DeleteFunc(ids, func(other layout.LayerID) bool { return other == id }))
}

// put stores an entry, and remove takes one away: every entry of the database,
// so that the sums of the buckets are right (M5).
func (tx *Tx) put(bucket string, key, value []byte) error {
	b := tx.bolt.Bucket([]byte(bucket))
	tx.touched.add(bucket, key)
	sum := b.Sequence() + layout.EntrySum(key, value)
	if old, ok := lookUp(b, key); ok {
		sum -= layout.EntrySum(key, old)
	}
	if err := b.Put(key, value); err != nil {
		return err
	}
	return b.SetSequence(sum)
}

func (tx *Tx) remove(bucket string, key []byte) error {
	b := tx.bolt.Bucket([]byte(bucket))
	tx.touched.add(bucket, key)
	old, ok := lookUp(b, key)
	if !ok {
		return nil
	}
	sum := b.Sequence() - layout.EntrySum(key, old)
	if err := b.Delete(key); err != nil {
		return err
	}
	return b.SetSequence(sum)
}

// lookUp finds an entry. bbolt's Get may return nil for an empty value.
func lookUp(b *bolt.Bucket, key []byte) (value []byte, ok bool) {
	k, v := b.Cursor().Seek(key)
	return v, k != nil && bytes.Equal(k, key)
}

// Empty tells whether the table has no records.
func (t Table[K, R]) Empty() bool {
	k, _ := t.bucket.Cursor().First()
	return k == nil
}
