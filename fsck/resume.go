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

	mu     sync.Mutex
	record layout.CheckRecord
	told   time.Time
}

// move changes the record, and tells of it if it is time.
func (m *marker) move(c *checker, by func(*layout.CheckRecord)) {
	if m.tell == nil || c.only != nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	by(&m.record)
	if time.Since(m.told) > markEvery {
		m.say(c)
	}
}

// end tells where a check was cut off.
func (m *marker) end(c *checker) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.tell != nil && (m.record.Blob != "" || m.record.Layer != "") {
		m.say(c)
	}
}

// say tells. What a finding was about is read again by whoever goes on, so that
// what is reported is what is wrong then.
func (m *marker) say(c *checker) {
	m.told = time.Now()
	r := m.record
	r.Files, r.Bytes, r.Bad = c.files.Load(), c.bytes.Load(), nil
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
// up to which an earlier check has read all, and what that has found bad.
func (c *checker) plan() {
	if c.rec == nil {
		return
	}
	toRead := func(object string, read bool) bool {
		return c.concerns(object) && (!read || slices.Contains(c.state.Bad, object))
	}
	c.blobs = queueOf(c.rec.blobs, func(d layout.BlobDigest) bool { return toRead(blobObject(d), d <= c.state.Blob) },
		func(r *layout.CheckRecord, d layout.BlobDigest) { r.Blob = max(r.Blob, d) })
	c.layers = queueOf(c.rec.layers, func(id layout.LayerID) bool { return toRead(layerObject(id), id <= c.state.Layer) },
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
	q.mu.Lock()
	defer q.mu.Unlock()
	q.read[key] = true
	for len(q.left) > 0 && q.read[q.left[0]] {
		upTo := q.left[0]
		q.left = q.left[1:]
		delete(q.read, upTo)
		if len(q.left) == 0 || !q.read[q.left[0]] {
			c.mark.move(c, func(r *layout.CheckRecord) { q.note(r, upTo) })
		}
	}
}
