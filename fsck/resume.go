package fsck

import (
	"slices"
	"sync"
	"time"

	"varve.dev/layout"
)

// Where a deep check is, so that one that is cut off can go on.

// markEvery is how often a check tells where it is.
const markEvery = 5 * time.Second

// marker keeps the record of a check up to date.
type marker struct {
	tell func(layout.CheckRecord) // nil: nobody wants to know

	mu      sync.Mutex // guards the rest
	record  layout.CheckRecord
	skipped []string // objects that could not be read for what was wrong with others
	told    time.Time

	telling sync.Mutex // held while somebody is told, which may take its time
}

func newMarker(tell func(layout.CheckRecord), record layout.CheckRecord) *marker {
	return &marker{tell: tell, record: record, told: time.Now()}
}

// skip notes that an object was not read, though those after it are.
func (m *marker) skip(object string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.skipped = append(m.skipped, object)
}

// move changes the record, and tells of it if it is time and nobody does.
func (m *marker) move(c *checker, by func(*layout.CheckRecord)) {
	if m.tell == nil || c.only != nil {
		return
	}
	m.mu.Lock()
	by(&m.record)
	due := time.Since(m.told) > markEvery
	m.mu.Unlock()
	if due && m.telling.TryLock() {
		defer m.telling.Unlock()
		m.say(c)
	}
}

// end tells where a check was cut off.
func (m *marker) end(c *checker) {
	if m.tell == nil || m.record.Blob == "" && m.record.Layer == "" {
		return
	}
	m.telling.Lock()
	defer m.telling.Unlock()
	m.say(c)
}

// say tells. What a finding was about is read again by whoever goes on, so that
// what is reported is what is wrong then; what this check was to read again for
// that reason, too, since it may not have come to it.
func (m *marker) say(c *checker) {
	m.mu.Lock()
	m.told = time.Now()
	r := m.record
	r.Files, r.Bytes = c.files.Load(), c.bytes.Load()
	r.Bad = slices.Concat(c.state.Bad, m.skipped)
	m.mu.Unlock()
	c.mu.Lock()
	for _, f := range c.findings {
		r.Bad = append(r.Bad, f.Object)
	}
	c.mu.Unlock()
	slices.Sort(r.Bad)
	r.Bad = slices.Compact(r.Bad)
	m.tell(r)
}

// plan lists what a deep check reads: of what is chosen, what comes after that
// up to which an earlier check has read all, what has come to be since, and what
// was bad then.
func (c *checker) plan() {
	toRead := func(object string, passed bool, created time.Time) bool {
		if passed && !created.After(c.state.Started) {
			if _, bad := slices.BinarySearch(c.state.Bad, object); !bad {
				return false
			}
		}
		return c.concerns(object)
	}
	c.blobs = queueOf(c.rec.blobs, func(d layout.BlobDigest) bool {
		return toRead(blobObject(d), d <= c.state.Blob, c.rec.blobs[d].Created)
	},
		func(r *layout.CheckRecord, d layout.BlobDigest) { r.Blob = max(r.Blob, d) })
	c.layers = queueOf(c.rec.layers, func(id layout.LayerID) bool {
		return toRead(layerObject(id), id <= c.state.Layer, c.rec.layers[id].Created)
	},
		func(r *layout.CheckRecord, id layout.LayerID) { r.Layer = max(r.Layer, id) })
	size := int64(0)
	for _, d := range c.blobs.list {
		size += c.rec.blobs[d].Size
	}
	for _, id := range c.layers.list {
		size += c.rec.layers[id].Size
	}
	if c.state.Sample > 0 {
		size = int64(float64(size) * c.state.Sample)
	}
	c.total = c.state.Bytes + size
}

// queue is what is to be read, in order, by several at once.
type queue[K ~string] struct {
	list []K
	note func(r *layout.CheckRecord, upTo K)

	mu   sync.Mutex
	left []K // of list, from the first that is not read
	read map[K]bool
}

func queueOf[K ~string, V any](all map[K]V, want func(K) bool, note func(*layout.CheckRecord, K)) *queue[K] {
	q := &queue[K]{note: note, read: map[K]bool{}}
	for k := range all {
		if want(k) {
			q.list = append(q.list, k)
		}
	}
	slices.Sort(q.list)
	q.left = q.list
	return q
}

// done notes that one is read; not if that was cut off.
func (q *queue[K]) done(c *checker, key K) {
	if c.ctx.Err() != nil {
		return
	}
	var upTo K
	q.mu.Lock()
	q.read[key] = true
	for len(q.left) > 0 && q.read[q.left[0]] {
		upTo, q.left = q.left[0], q.left[1:]
		delete(q.read, upTo)
	}
	q.mu.Unlock()
	if upTo != "" {
		c.mark.move(c, func(r *layout.CheckRecord) { q.note(r, upTo) })
	}
}
