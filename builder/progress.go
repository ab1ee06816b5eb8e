package builder

import (
	"sync"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// progress tells of the vertices of one build, in BuildKit's terms. What it is
// told goes to one function, from one goroutine at a time.
type progress struct {
	mu    sync.Mutex
	send  func(*client.SolveStatus) // nil: nobody listens
	known map[digest.Digest]*client.Vertex
}

func newProgress(send func(*client.SolveStatus)) *progress {
	return &progress{send: send, known: map[digest.Digest]*client.Vertex{}}
}

func (p *progress) tell(s *client.SolveStatus) {
	if p.send != nil {
		p.send(s)
	}
}

// vertexOf returns what is told of a vertex, and makes it up at the first time.
// Callers hold mu.
func (p *progress) vertexOf(v *vertex) *client.Vertex {
	c := p.known[v.digest]
	if c == nil {
		c = &client.Vertex{Digest: v.digest, Name: v.name()}
		if v.meta != nil {
			c.ProgressGroup = v.meta.ProgressGroup
		}
		for _, in := range v.inputs {
			c.Inputs = append(c.Inputs, in.vertex)
		}
		p.known[v.digest] = c
	}
	return c
}

// change tells of a vertex after fn has changed it.
func (p *progress) change(v *vertex, fn func(c *client.Vertex, now *time.Time)) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.vertexOf(v)
	fn(c, &now)
	told := *c
	p.tell(&client.SolveStatus{Vertexes: []*client.Vertex{&told}})
}

// begin tells that a vertex is being worked on.
func (p *progress) begin(v *vertex) {
	p.change(v, func(c *client.Vertex, now *time.Time) {
		if c.Started == nil {
			c.Started = now
		}
		c.Completed, c.Error = nil, ""
	})
}

// end tells what became of a vertex that was begun.
func (p *progress) end(v *vertex, err error) {
	p.change(v, func(c *client.Vertex, now *time.Time) {
		if c.Started == nil {
			c.Started = now
		}
		c.Completed = now
		if err != nil {
			c.Error = err.Error()
		}
	})
}

// cached tells that a vertex was known, if it was not told of yet.
func (p *progress) cached(v *vertex) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.vertexOf(v)
	if c.Completed != nil {
		return
	}
	if c.Started == nil {
		c.Started = &now
	}
	c.Completed, c.Cached = &now, true
	told := *c
	p.tell(&client.SolveStatus{Vertexes: []*client.Vertex{&told}})
}

// log hands on what a vertex said on one of its streams.
func (p *progress) log(v *vertex, stream int, data []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tell(&client.SolveStatus{Logs: []*client.VertexLog{{Vertex: v.digest, Stream: stream, Data: data, Timestamp: time.Now()}}})
}

// warn hands on a frontend's warning.
func (p *progress) warn(w *client.VertexWarning) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tell(&client.SolveStatus{Warnings: []*client.VertexWarning{w}})
}

// part is one of several things that a vertex does at once: a layer that is
// brought, files that arrive.
type part struct {
	p       *progress
	status  client.VertexStatus
	started time.Time
	last    time.Time
}

// partEvery is how often a part's progress is told at most.
const partEvery = 100 * time.Millisecond

// part begins a part of a vertex; what is done in it is action, in one word. It
// is used from one goroutine at a time.
func (p *progress) part(v *vertex, id, action string) *part {
	now := time.Now()
	t := &part{p: p, started: now, status: client.VertexStatus{ID: id, Name: action, Vertex: v.digest, Started: &now}}
	t.send(now)
	return t
}

func (t *part) send(now time.Time) {
	t.last = now
	told := t.status
	told.Timestamp = now
	t.p.mu.Lock()
	defer t.p.mu.Unlock()
	t.p.tell(&client.SolveStatus{Statuses: []*client.VertexStatus{&told}})
}

// at tells how far the part has come.
func (t *part) at(current, total int64) {
	t.status.Current, t.status.Total = current, total
	if now := time.Now(); now.Sub(t.last) >= partEvery {
		t.send(now)
	}
}

// done tells that the part is over.
func (t *part) done() {
	now := time.Now()
	t.status.Completed = &now
	t.send(now)
}

// own makes a vertex for work that no definition has: an export.
func (p *progress) own(name string) *vertex {
	return &vertex{digest: digest.FromString("varve " + name), meta: &pb.OpMetadata{Description: map[string]string{customName: name}}}
}
