package buildkit

import (
	"context"
	"fmt"
	"sync"
	"time"

	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	pb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"

	"varve.dev/builder"
	"varve.dev/errdefs"
)

// builds are those that run, and the last ones that did.
type builds struct {
	mu      *sync.Mutex
	changed *sync.Cond // something was told, begun, opened or ended
	all     map[string]*build
	ended   []*build                     // the oldest first
	told    []*control.BuildHistoryEvent // for those who listen
	// firstTold is the number of the first of them.
	firstTold int
	listeners int
}

// build is one build, with all that was told of it.
type build struct {
	builds *builds
	record *control.BuildHistoryRecord
	bridge pb.LLBBridgeServer
	over   bool
	// Output that is too much to keep is forgotten, the oldest first.
	events []*client.SolveStatus
	logs   int // bytes of output in events
	// Of vertices, for the record.
	vertices map[string]*client.Vertex
	warnings int
	blobs    map[digest.Digest][]byte // that the record names
	kept     int                      // bytes of them
}

const (
	// keptBuilds is how many builds that are over can be told of.
	keptBuilds = 64
	// keptLogs bounds the output that is kept of one build, in bytes.
	keptLogs = 4 << 20
	// keptBytes bounds what is kept of all builds that are over, in bytes: their
	// output, and once more as a blob.
	keptBytes = 32 << 20
)

func newBuilds() builds {
	mu := &sync.Mutex{}
	return builds{mu: mu, changed: sync.NewCond(mu), all: map[string]*build{}}
}

// begin makes a build known. Errors: ErrAlreadyExists.
func (bs *builds) begin(req *control.SolveRequest) (*build, error) {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	if old := bs.all[req.Ref]; old != nil {
		if !old.over {
			return nil, fmt.Errorf("build %s: %w", req.Ref, errdefs.ErrAlreadyExists)
		}
		bs.forget(old)
	}
	b := &build{builds: bs, vertices: map[string]*client.Vertex{}, record: &control.BuildHistoryRecord{
		Ref: req.Ref, Frontend: req.Frontend, FrontendAttrs: req.FrontendAttrs, Exporters: req.Exporters, CreatedAt: timestamppb.Now(),
	}}
	bs.all[req.Ref] = b
	bs.announce(b.event())
	return b, nil
}

// end says that a build is over.
func (bs *builds) end(b *build, response builder.Response, err error) {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	b.over = true
	b.record.CompletedAt = timestamppb.Now()
	b.finish(response, err)
	bs.ended = append(bs.ended, b)
	bs.trim()
	bs.announce(b.event())
}

// trim forgets builds that are over, the oldest first, until few enough are kept:
// neither the last one nor those that somebody wants kept. Callers hold mu.
func (bs *builds) trim() {
	bytes := 0
	for _, b := range bs.ended {
		bytes += b.bytes()
	}
	for i := 0; (len(bs.ended) > keptBuilds || bytes > keptBytes) && i < len(bs.ended)-1; {
		if bs.ended[i].record.Pinned {
			i++
			continue
		}
		bytes -= bs.ended[i].bytes()
		bs.forget(bs.ended[i])
	}
}

// bytes is what is kept of a build that is over.
func (b *build) bytes() int { return b.logs + b.kept }

// forget drops a build that is over. Callers hold mu.
func (bs *builds) forget(b *build) {
	delete(bs.all, b.record.Ref)
	for i := range bs.ended {
		if bs.ended[i] == b {
			bs.ended = append(bs.ended[:i], bs.ended[i+1:]...)
			return
		}
	}
}

// tell takes what happened in a build.
func (b *build) tell(s *client.SolveStatus) {
	b.builds.mu.Lock()
	defer b.builds.mu.Unlock()
	for _, v := range s.Vertexes {
		b.vertices[v.Digest.String()] = v
	}
	for _, l := range s.Logs {
		b.logs += len(l.Data)
	}
	b.warnings += len(s.Warnings)
	b.events = append(b.events, s)
	for i := 0; b.logs > keptLogs && i < len(b.events)-1; i++ {
		for _, l := range b.events[i].Logs {
			b.logs -= len(l.Data)
		}
		b.events[i] = &client.SolveStatus{Vertexes: b.events[i].Vertexes, Statuses: b.events[i].Statuses, Warnings: b.events[i].Warnings}
	}
	b.builds.changed.Broadcast()
}

// wait waits until ok is true. Callers hold mu; it is let go of meanwhile.
func (bs *builds) wait(ctx context.Context, ok func() bool) error {
	stop := context.AfterFunc(ctx, func() {
		bs.mu.Lock()
		defer bs.mu.Unlock()
		bs.changed.Broadcast()
	})
	defer stop()
	for !ok() {
		if err := ctx.Err(); err != nil {
			return err
		}
		bs.changed.Wait()
	}
	return nil
}

// followWait is how long a build may take to begin that somebody asks for.
const followWait = 10 * time.Second

// follow calls send with what is told of a build, until it is over. A slow
// listener holds nobody up.
func (bs *builds) follow(ctx context.Context, ref string, send func(*client.SolveStatus) error) error {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	soon, cancel := context.WithTimeout(ctx, followWait)
	defer cancel()
	var b *build
	if err := bs.wait(soon, func() bool { b = bs.all[ref]; return b != nil }); err != nil {
		return fmt.Errorf("no such job %s: %w", ref, errdefs.ErrNotFound)
	}
	next := 0
	for {
		if err := bs.wait(ctx, func() bool { return next < len(b.events) || b.over }); err != nil {
			return err
		}
		if next == len(b.events) {
			return nil
		}
		some := b.events[next:]
		next = len(b.events)
		bs.mu.Unlock()
		var err error
		for _, s := range some {
			if err == nil {
				err = send(s)
			}
		}
		bs.mu.Lock()
		if err != nil {
			return err
		}
	}
}

// open makes a build's bridge known, or takes it back.
func (bs *builds) open(ref string, bridge pb.LLBBridgeServer) {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	if b := bs.all[ref]; b != nil {
		b.bridge = bridge
		bs.changed.Broadcast()
	}
}

// bridgeWait is how long a bridge may take to be there.
const bridgeWait = 10 * time.Second

// bridge waits for a build's bridge.
func (bs *builds) bridge(ctx context.Context, ref string) (pb.LLBBridgeServer, error) {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	soon, cancel := context.WithTimeout(ctx, bridgeWait)
	defer cancel()
	var found pb.LLBBridgeServer
	err := bs.wait(soon, func() bool {
		b := bs.all[ref]
		if b != nil {
			found = b.bridge
		}
		return b != nil && (found != nil || b.over)
	})
	if err == nil && found == nil {
		err = context.Canceled
	}
	return found, err
}
