package builder

import (
	"maps"
	"slices"
	"sync"

	"github.com/moby/buildkit/client/llb/sourceresolver"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// trace is what one frontend did: how it was called, and what it asked the
// build for. Provenance is told from it, when the build is over. It holds
// definitions, which are bounded, and nothing that grows with what was done for
// them.
type trace struct {
	j    *job
	req  *request // nil for what runs outside of the build, and for plain definitions
	root *request // what the client asked for; nil: nothing worth telling

	mu     sync.Mutex
	refs   []*reference
	looked capture  // images alone
	called []*trace // frontends that came to something
	lost   bool     // there was too much to remember
}

// maxTraced bounds what one build remembers for the sake of its provenance, in
// bytes of definitions and options. What is too much makes provenance
// incomplete.
const maxTraced = 64 << 20

// room tells whether n bytes more may be remembered.
func (t *trace) room(n int) bool {
	return t.j.invocation.traced.Add(int64(n)) <= maxTraced
}

// request is the call of a frontend, without what is nobody's business.
type request struct {
	frontend string
	args     map[string]string
	// inputs are those whose makers are known. They are worked out when the
	// call begins: a maker in another build may be gone when it ends.
	inputs map[string]*types.RequestProvenance
	// partial: there are more inputs of known makers.
	partial bool
}

// maxRequests bounds how many calls the provenance of one call has in it: each
// may have taken the same input under several names, and those again.
const maxRequests = 1000

// requestOf describes a call.
func (j *job) requestOf(frontend string, opts map[string]string, inputs map[string]*pb.Definition) *request {
	r := &request{frontend: frontend, args: tellable(opts)}
	total := 1
	for _, name := range slices.Sorted(maps.Keys(inputs)) {
		in, ok := j.b.producers.find(inputs[name])
		if !ok {
			continue
		}
		if total += countRequests(in); total > maxRequests {
			r.partial = true
			break
		}
		if r.inputs == nil {
			r.inputs = map[string]*types.RequestProvenance{}
		}
		r.inputs[name] = in
	}
	return r
}

func countRequests(r *types.RequestProvenance) int {
	if r == nil || r.Request == nil {
		return 1
	}
	n := 1 + countRequests(r.Request.Root)
	for _, in := range r.Request.Inputs {
		n += countRequests(in)
	}
	return n
}

// newTrace is that of the client itself.
func (j *job) newTrace() *trace {
	t := &trace{j: j}
	if j.req.Frontend != "" || len(j.req.Attrs) > 0 || len(j.req.Inputs) > 0 {
		t.root = j.requestOf(j.req.Frontend, j.req.Attrs, j.req.Inputs)
	}
	return t
}

// call begins the trace of a frontend that this one calls.
func (t *trace) call(frontend string, opts map[string]string, inputs map[string]*pb.Definition) *trace {
	root := t.root
	if root == nil {
		root = t.req
	}
	return &trace{j: t.j, req: t.j.requestOf(frontend, opts, inputs), root: root}
}

// came tells that a frontend came to a result. Who is handed one of its
// references as an input learns from now on how that was made.
func (t *trace) came(from *trace, res *gwclient.Result) {
	size := 0
	for k, v := range from.req.args {
		size += len(k) + len(v)
	}
	t.mu.Lock()
	if t.room(size) {
		t.called = append(t.called, from)
	} else {
		t.lost = true
	}
	t.mu.Unlock()
	for _, ref := range referencesOf(res) {
		t.j.b.producers.add(ref)
	}
}

// made tells of a reference that a frontend asked for, and returns it.
func (t *trace) made(ref *reference) *reference {
	ref.trace = t
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.room(ref.def.SizeVT()) {
		t.refs = append(t.refs, ref)
	} else {
		t.lost = true
	}
	return ref
}

// lookedUp tells of what a frontend looked up: an image, or something that is
// no matter of provenance.
func (t *trace) lookedUp(m *sourceresolver.MetaResponse, opt sourceresolver.Opt, err error) {
	img, ok := imageOf(m, opt)
	if err != nil || !ok {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.looked.addImage(img)
}

// all returns the references and images of a trace and of those below it, the
// references of the trace itself first, and whether some were lost.
func (t *trace) all() (refs []*reference, images []types.ImageSource, lost bool) {
	t.mu.Lock()
	refs, images, lost = slices.Clone(t.refs), slices.Clone(t.looked.sources.Images), t.lost
	called := slices.Clone(t.called)
	t.mu.Unlock()
	for _, c := range called {
		r, i, l := c.all()
		refs, images, lost = append(refs, r...), append(images, i...), lost || l
	}
	return refs, images, lost
}

// referencesOf are the references of a result that are not empty, those of its
// attestations too.
func referencesOf(res *gwclient.Result) (out []*reference) {
	if res == nil {
		return nil
	}
	_ = res.EachRef(func(r gwclient.Reference) error {
		if ref, ok := r.(*reference); ok && ref != nil {
			out = append(out, ref)
		}
		return nil
	})
	return out
}

// producers knows the results of frontends while their builds last, by the
// vertex that they are an output of. So an input of a frontend can be told to
// be the result of another, though only its definition is handed over.
type producers struct {
	mu   sync.Mutex
	refs map[digest.Digest][]*reference
}

func newProducers() *producers { return &producers{refs: map[digest.Digest][]*reference{}} }

// add remembers the result of a frontend, until drop.
func (p *producers) add(ref *reference) {
	head := ref.graph.root.vertex
	p.mu.Lock()
	defer p.mu.Unlock()
	if !slices.Contains(p.refs[head], ref) {
		p.refs[head] = append(p.refs[head], ref)
	}
}

// drop forgets the results of a build.
func (p *producers) drop(j *job) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for head, refs := range p.refs {
		if refs = slices.DeleteFunc(refs, func(r *reference) bool { return r.j == j }); len(refs) == 0 {
			delete(p.refs, head)
		} else {
			p.refs[head] = refs
		}
	}
}

// find tells how the result of a definition was asked for, if there is one
// answer to that.
func (p *producers) find(def *pb.Definition) (*types.RequestProvenance, bool) {
	p.mu.Lock()
	refs := slices.Clone(p.refs[headOf(def)])
	p.mu.Unlock()
	var found *types.RequestProvenance
	for _, ref := range refs {
		if ref.trace == nil || ref.trace.req == nil {
			continue
		}
		r := ref.trace.req.tell(ref.captured().sources)
		if found != nil && !found.Equal(r) {
			return nil, false
		}
		found = r
	}
	return found, found != nil
}

// headOf is the vertex that a definition's result is an output of; "" if it has
// none.
func headOf(def *pb.Definition) digest.Digest {
	if def == nil || len(def.Def) == 0 {
		return ""
	}
	var op pb.Op
	if err := op.UnmarshalVT(def.Def[len(def.Def)-1]); err != nil || len(op.Inputs) == 0 {
		return ""
	}
	return digest.Digest(op.Inputs[0].Digest)
}
