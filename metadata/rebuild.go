package metadata

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// rebuild makes a database from the change log and from what stands on disk,
// in place of one that is lost or damaged, which stays beside it under
// layout.DamagedFile. What the log tells of and the disk has not is dropped and
// listed; what stands on disk unknown to the log is taken up if it is an image,
// kept if it is somebody's data, and swept if it can be had again.
//
// It may be cut off at any point and run again.
func rebuild(root *durable.Root, why error) error {
	r := newRebuilder(root)
	r.report = layout.RebuiltRecord{When: time.Now().UTC(), Why: why.Error()}
	r.readLog()
	r.decode()
	err := r.takeBack()
	if err == nil {
		r.check()
		err = r.adopt()
	}
	if err == nil {
		err = r.write()
	}
	if err != nil {
		return fmt.Errorf("rebuild the database: %w", err)
	}
	return nil
}

func newRebuilder(root *durable.Root) *rebuilder {
	r := &rebuilder{root: root, state: map[string]map[string]json.RawMessage{}}
	for _, b := range layout.LoggedBuckets() {
		r.state[b] = map[string]json.RawMessage{}
	}
	return r
}

type rebuilder struct {
	root    *durable.Root
	store   string // its id
	last    uint64
	state   map[string]map[string]json.RawMessage // bucket → key → record
	sweeps  []layout.SweepRecord
	records *records
	report  layout.RebuiltRecord
}

// records are the state, decoded.
type records struct {
	blobs      map[layout.BlobDigest]layout.BlobRecord
	layers     map[layout.LayerID]layout.LayerRecord
	snapshots  map[layout.SnapshotKey]layout.SnapshotRecord
	images     map[string]layout.ImageRecord
	containers map[layout.ContainerID]layout.ContainerRecord
	cache      map[string]layout.CacheRecord
	edges      map[layout.Edge]bool
}

// readLog replays the log, up to the first line that is not whole.
func (r *rebuilder) readLog() {
	f, err := os.OpenFile(r.root.Path(layout.LogFile), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		r.lost("the log: %v", err)
		return
	}
	defer f.Close()
	lines := bufio.NewReaderSize(f, 1<<20)
	for n := 1; ; n++ {
		line, err := layout.ReadLine(lines)
		if errors.Is(err, io.EOF) {
			return // the end, or a line that a power cut tore
		}
		if err != nil {
			r.lost("the log from line %d on: %v", n, err)
			return
		}
		c, err := layout.DecodeLine(line)
		if err == nil && n > 1 && c.Seq != r.last && c.Seq != r.last+1 {
			err = fmt.Errorf("it has number %d, the line before %d", c.Seq, r.last)
		}
		if err != nil {
			if _, perr := lines.Peek(1); perr == nil {
				r.lost("the log from line %d on: %v", n, err)
			}
			return
		}
		if n == 1 {
			r.store = c.Store
		}
		r.last = c.Seq
		for _, ch := range c.Changes {
			bucket, ok := r.state[ch.Bucket]
			switch {
			case !ok:
			case ch.Value == nil:
				delete(bucket, ch.Key)
			default:
				bucket[ch.Key] = ch.Value
			}
		}
	}
}

func (r *rebuilder) lost(format string, args ...any) {
	r.report.Lost = append(r.report.Lost, fmt.Sprintf(format, args...))
}

func decodeAll[K ~string, R any](r *rebuilder, bucket string) map[K]R {
	out := map[K]R{}
	for key, value := range r.state[bucket] {
		var rec R
		if err := json.Unmarshal(value, &rec); err != nil {
			r.lost("record %s/%q: %v", bucket, key, err)
			continue
		}
		out[K(key)] = rec
	}
	return out
}

func (r *rebuilder) decode() {
	r.records = &records{
		blobs: decodeAll[layout.BlobDigest, layout.BlobRecord](r, layout.BucketBlobs), layers: decodeAll[layout.LayerID, layout.LayerRecord](r, layout.BucketLayers),
		snapshots: decodeAll[layout.SnapshotKey, layout.SnapshotRecord](r, layout.BucketSnapshots), images: decodeAll[string, layout.ImageRecord](r, layout.BucketImages),
		containers: decodeAll[layout.ContainerID, layout.ContainerRecord](r, layout.BucketContainers), cache: decodeAll[string, layout.CacheRecord](r, layout.BucketCache),
		edges: map[layout.Edge]bool{},
	}
}

// takeBack returns writable layers to their place that were being committed: a
// commit renames before it records, and its intent is lost. Those that nothing
// holds were a build step's.
func (r *rebuilder) takeBack() error {
	held := map[layout.Node]bool{}
	for key := range r.state[layout.BucketEdges] {
		if e, err := layout.ParseEdge([]byte(key)); err == nil {
			held[e.Child] = true
		}
	}
	var changed []string
	for key, s := range r.records.snapshots {
		active, made := layout.ActivePath(s.Layer), layout.LayerPath(s.Layer)
		_, known := r.records.layers[s.Layer]
		if s.Kind != layout.SnapshotActive || !held[layout.SnapshotNode(key)] || known || r.isDir(active) || !r.isDir(path.Join(made, layout.TreeDir)) {
			continue
		}
		work := path.Join(made, layout.WorkDir)
		if err := r.root.Mkdir(work, 0o711); err != nil && !errors.Is(err, errdefs.ErrAlreadyExists) {
			return err
		}
		if err := r.root.Rename(made, active); err != nil {
			return err
		}
		changed = append(changed, active)
	}
	if len(changed) == 0 {
		return nil
	}
	return r.root.SyncNames(append(changed, layout.ActiveDir, layout.LayersDir)...)
}

// check drops what the disk has not, and what stood on it.
func (r *rebuilder) check() {
	rec := r.records
	for d, b := range rec.blobs {
		if size, ok := r.size(layout.BlobPath(d)); !ok || size != b.Size {
			r.lost("blob %s", d)
			delete(rec.blobs, d)
		}
	}
	for id, l := range rec.layers {
		if _, ok := rec.blobs[l.Manifest]; !ok || !r.isDir(path.Join(layout.LayerPath(id), layout.TreeDir)) {
			r.lost("layer %s", id)
			delete(rec.layers, id)
		}
	}
	for changed := true; changed; { // a chain falls from the bottom up
		changed = false
		for key, s := range rec.snapshots {
			if !r.stands(s) {
				r.lost("snapshot %q", key)
				delete(rec.snapshots, key)
				changed = true
			}
		}
	}
	for name, i := range rec.images {
		if _, ok := rec.blobs[layout.BlobDigest(i.Target.Digest)]; !ok {
			r.lost("image %s (%s)", name, i.Target.Digest)
			delete(rec.images, name)
		}
	}
	for id, c := range rec.containers {
		if _, ok := rec.snapshots[c.Snapshot]; !ok || !r.isDir(layout.ContainerPath(id)) {
			r.lost("container %s (%s)", c.Name, id)
			delete(rec.containers, id)
		}
	}
	for key, c := range rec.cache {
		for _, s := range c.Snapshots {
			if _, ok := rec.snapshots[s]; !ok && s != "" {
				delete(rec.cache, key) // the step runs again
			}
		}
	}
	for key := range r.state[layout.BucketEdges] {
		e, err := layout.ParseEdge([]byte(key))
		if err == nil && r.there(e.Parent) && r.there(e.Child) {
			rec.edges[e] = true
		}
	}
}

func (r *rebuilder) size(rel string) (int64, bool) {
	fi, err := os.Lstat(r.root.Path(rel))
	if err != nil || !fi.Mode().IsRegular() {
		return 0, false
	}
	return fi.Size(), true
}

func (r *rebuilder) isDir(rel string) bool {
	fi, err := os.Lstat(r.root.Path(rel))
	return err == nil && fi.IsDir()
}

// stands tells whether a snapshot has all that it needs.
func (r *rebuilder) stands(s layout.SnapshotRecord) bool {
	if s.Parent != "" {
		if _, ok := r.records.snapshots[s.Parent]; !ok {
			return false
		}
	}
	switch {
	case s.Kind == layout.SnapshotCommitted:
		_, ok := r.records.layers[s.Layer]
		return ok
	case s.Layer != "":
		return r.isDir(path.Join(layout.ActivePath(s.Layer), layout.TreeDir))
	}
	return true
}

// there tells whether a node has its record.
func (r *rebuilder) there(n layout.Node) (ok bool) {
	kind, id := n.Split()
	switch rec := r.records; kind {
	case layout.KindBlob:
		_, ok = rec.blobs[layout.BlobDigest(id)]
	case layout.KindLayer:
		_, ok = rec.layers[layout.LayerID(id)]
	case layout.KindSnapshot:
		_, ok = rec.snapshots[layout.SnapshotKey(id)]
	case layout.KindImage:
		_, ok = rec.images[id]
	case layout.KindContainer:
		_, ok = rec.containers[layout.ContainerID(id)]
	case layout.KindCache:
		_, ok = rec.cache[id]
	case layout.KindActive:
		ok = r.isDir(layout.ActivePath(layout.LayerID(id)))
	case layout.KindAPI:
		ok = true
	}
	return ok
}

// write makes the new database and puts it in the old one's place.
func (r *rebuilder) write() error {
	tmp := r.root.Path(temporaryDatabase)
	b, file, err := openBolt(tmp, createWait, func(f *os.File) error { return f.Truncate(0) })
	if err != nil {
		return err
	}
	defer unlock(file)
	if err := b.Update(r.fill); err != nil {
		return errors.Join(openError(tmp, err), b.Close())
	}
	if err := b.Close(); err != nil {
		return openError(tmp, err)
	}
	if err := setAside(r.root, layout.DatabaseFile); err != nil {
		return err
	}
	if made(r.root) {
		if err := r.root.Replace(layout.DatabaseFile, layout.DamagedFile); err != nil {
			return err
		}
	}
	if err := r.root.Replace(temporaryDatabase, layout.DatabaseFile); err != nil {
		return err
	}
	return r.root.Remove(layout.SuspectFile)
}

// fill writes everything in one transaction. Edges are of records that exist,
// and what nothing refers to any more is collected by the same rules as ever.
func (r *rebuilder) fill(btx *bolt.Tx) error {
	if err := fill(btx); err != nil {
		return err
	}
	tx, rec := &Tx{bolt: btx}, r.records
	err := errors.Join(
		putAll(tx.Blobs().Put, rec.blobs), putAll(tx.PutLayer, rec.layers), putAll(tx.Snapshots().Put, rec.snapshots),
		putAll(tx.Images().Put, rec.images), putAll(tx.Containers().Put, rec.containers), putAll(tx.PutCache, rec.cache),
	)
	for e := range rec.edges {
		err = errors.Join(err, tx.Link(e))
	}
	for _, s := range r.sweeps {
		err = errors.Join(err, tx.Sweeps().Put(layout.NewSweepID(s.Node), s))
	}
	if err == nil {
		err = r.collect(tx)
	}
	if err == nil {
		err = r.fillMeta(tx)
	}
	return err
}

func (r *rebuilder) fillMeta(tx *Tx) error {
	own, err := tx.metas().Get(layout.MetaKey)
	if err != nil {
		return err
	}
	if r.store != "" {
		own.ID = r.store
	}
	r.report.Records = len(r.records.blobs) + len(r.records.layers) + len(r.records.snapshots) + len(r.records.images) + len(r.records.containers) + len(r.records.cache)
	slices.Sort(r.report.Lost)
	slices.Sort(r.report.Kept)
	return errors.Join(
		tx.metas().Put(layout.MetaKey, own),
		tx.rebuilds().Put(layout.RebuiltKey, r.report),
		tx.mark(r.last+1), // past every number in the log: it is written anew
	)
}

func putAll[K ~string, R any](put func(K, R) error, all map[K]R) error {
	for key, rec := range all {
		if err := put(key, rec); err != nil {
			return err
		}
	}
	return nil
}

// collect drops what lost its last reference with what was lost. The files of
// a writable layer stay: they are somebody's data.
func (r *rebuilder) collect(tx *Tx) error {
	var nodes []layout.Node
	for key, s := range r.records.snapshots {
		if s.Kind == layout.SnapshotCommitted || tx.Referenced(layout.SnapshotNode(key)) {
			continue
		}
		if err := tx.forgetActive(key); err != nil {
			return err
		}
		if s.Layer != "" {
			r.report.Kept = append(r.report.Kept, layout.ActivePath(s.Layer))
		}
	}
	for d := range r.records.blobs {
		nodes = append(nodes, layout.BlobNode(d))
	}
	for id := range r.records.layers {
		nodes = append(nodes, layout.LayerNode(id))
	}
	for key := range r.records.snapshots {
		nodes = append(nodes, layout.SnapshotNode(key))
	}
	for _, n := range nodes {
		if !tx.Exists(n) {
			continue // went with another one
		}
		if err := tx.Collect(n); err != nil {
			return err
		}
	}
	return nil
}
