package builder

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// outputs are the results of a vertex, one committed snapshot for each output;
// "" is an empty tree.
type outputs struct {
	key       string // canonical
	snapshots []layout.SnapshotKey
}

// result is what came of a vertex.
type result struct {
	out outputs
	err error
}

// solve returns the snapshot of an edge.
func (s *session) solve(ctx context.Context, g *graph, e edge) (layout.SnapshotKey, error) {
	out, err := s.vertex(ctx, g, e.vertex)
	if err != nil {
		return "", err
	}
	if e.output >= len(out.snapshots) {
		return "", fmt.Errorf("vertex %s has no output %d: %w", e.vertex, e.output, errdefs.ErrInvalidArgument)
	}
	return out.snapshots[e.output], nil
}

// vertex solves a vertex once in this build, however many want it. One that was
// called off, because something beside it failed, has no result: whoever else
// wants it tries itself, for the error to tell is the failure.
func (s *session) vertex(ctx context.Context, g *graph, d digest.Digest) (outputs, error) {
	return s.solving.do(ctx, string(d), func() (outputs, error) {
		s.mu.Lock()
		known, ok := s.memo[d]
		s.mu.Unlock()
		if ok {
			return known.out, known.err
		}
		out, err := s.vertexOnce(ctx, g, g.vertices[d])
		if !errors.Is(err, context.Canceled) {
			s.mu.Lock()
			s.memo[d] = result{out, err}
			s.mu.Unlock()
		}
		return out, err
	})
}

func (s *session) vertexOnce(ctx context.Context, g *graph, v *vertex) (outputs, error) {
	if src := v.op.GetSource(); src != nil {
		out, err := s.source(ctx, v, src)
		return out, s.fail(v, err)
	}
	ignore := v.meta != nil && v.meta.IgnoreCache
	if !ignore {
		// Top-down: what is known needs nothing of what is below.
		if key, err := s.keyWithoutSolving(ctx, g, v); err == nil && key != "" {
			if out, ok, err := s.lookup(ctx, v, key); err != nil || ok {
				return out, s.fail(v, err)
			}
		}
	}
	inputs, err := s.inputs(ctx, g, v)
	if err != nil {
		return outputs{}, err // names its own line
	}
	keys := make([]string, len(inputs))
	for i, in := range inputs {
		keys[i] = inputKey(in, v.inputs[i].output)
	}
	key, err := definitionKey(v, keys)
	if err != nil {
		return outputs{}, s.fail(v, err)
	}
	out, err := s.b.flights.do(ctx, key, func() (outputs, error) {
		return s.decide(ctx, v, key, keys, inputs, ignore)
	})
	if err != nil {
		return out, s.fail(v, err)
	}
	// Another build may have made it, and only that build holds it so far.
	return out, s.hold(ctx, out.snapshots)
}

// inputKey names one output of a vertex.
func inputKey(in outputs, output int) string { return fmt.Sprintf("%s/%d", in.key, output) }

// keyWithoutSolving is the definition key by what the store knows of the
// vertices below, or "" where that is not enough to tell.
func (s *session) keyWithoutSolving(ctx context.Context, g *graph, v *vertex) (string, error) {
	s.mu.Lock()
	known := s.keys[v.digest]
	s.mu.Unlock()
	if known != "" {
		return known, nil
	}
	keys := make([]string, len(v.inputs))
	for i, e := range v.inputs {
		below := g.vertices[e.vertex]
		var canonical string
		if src := below.op.GetSource(); src != nil {
			// A source's key is its identity, which is cheap to have.
			id, err := s.sourceKey(ctx, below, src)
			if err != nil {
				return "", err
			}
			canonical = id
		} else {
			key, err := s.keyWithoutSolving(ctx, g, below)
			if err != nil || key == "" {
				return "", err
			}
			if canonical, err = s.canonical(ctx, key); err != nil {
				return "", err
			}
		}
		keys[i] = fmt.Sprintf("%s/%d", canonical, e.output)
	}
	key, err := definitionKey(v, keys)
	if err == nil {
		s.mu.Lock()
		s.keys[v.digest] = key
		s.mu.Unlock()
	}
	return key, err
}

// canonical follows the alias that is stored for a key.
func (s *session) canonical(ctx context.Context, key string) (string, error) {
	out := key
	err := s.b.DB.View(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Cache().Get(key)
		if err == nil && rec.Alias != "" {
			out = rec.Alias
		}
		return ignoreNotFound(err)
	})
	return out, err
}

func ignoreNotFound(err error) error {
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	return err
}

// lookup takes a stored result, and holds it.
func (s *session) lookup(ctx context.Context, v *vertex, key string) (outputs, bool, error) {
	out, ok, err := s.peek(ctx, key)
	if err != nil || !ok {
		return outputs{}, false, err
	}
	err = s.lease.Hold(ctx, func(tx *metadata.Tx) ([]layout.Node, error) {
		nodes, err := nodesOf(tx, out.snapshots)
		if err != nil {
			return nil, err
		}
		return nodes, tx.TouchCache(out.key, time.Now().UTC())
	})
	if errors.Is(err, errdefs.ErrNotFound) {
		return outputs{}, false, nil // evicted between the look and the hold
	}
	if err != nil {
		return outputs{}, false, err
	}
	s.count(v, Cached)
	return out, true, nil
}

// peek looks a result up without holding it.
func (s *session) peek(ctx context.Context, key string) (out outputs, ok bool, err error) {
	err = s.b.DB.View(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Cache().Get(key)
		if err == nil && rec.Alias != "" {
			key = rec.Alias
			rec, err = tx.Cache().Get(key)
		}
		if err == nil && len(rec.Snapshots) > 0 {
			out, ok = outputs{key: key, snapshots: rec.Snapshots}, true
		}
		return ignoreNotFound(err)
	})
	return out, ok, err
}

// hold keeps snapshots until the session ends. Errors: ErrNotFound for one that
// was removed before.
func (s *session) hold(ctx context.Context, snaps []layout.SnapshotKey) error {
	return s.lease.Hold(ctx, func(tx *metadata.Tx) ([]layout.Node, error) { return nodesOf(tx, snaps) })
}

// nodesOf are snapshots, which have to exist; "" stands for none.
func nodesOf(tx *metadata.Tx, snaps []layout.SnapshotKey) (nodes []layout.Node, err error) {
	for _, snap := range snaps {
		if snap == "" {
			continue
		}
		if !tx.Snapshots().Has(snap) {
			return nil, fmt.Errorf("snapshot %q: %w", snap, errdefs.ErrNotFound)
		}
		nodes = append(nodes, layout.SnapshotNode(snap))
	}
	return nodes, nil
}

// inputs solves what is below a vertex, in parallel.
func (s *session) inputs(ctx context.Context, g *graph, v *vertex) ([]outputs, error) {
	out := make([]outputs, len(v.inputs))
	group, ctx := errgroup.WithContext(ctx)
	for i, e := range v.inputs {
		group.Go(func() (err error) {
			out[i], err = s.vertex(ctx, g, e.vertex)
			return err
		})
	}
	return out, group.Wait()
}

// decide looks once more, with all inputs known, and runs the operation if
// that does not help.
func (s *session) decide(ctx context.Context, v *vertex, key string, keys []string, inputs []outputs, ignore bool) (outputs, error) {
	if !ignore {
		if out, ok, err := s.lookup(ctx, v, key); err != nil || ok {
			return out, err
		}
	}
	alias := ""
	if file := v.op.GetFile(); file != nil {
		content, ok, err := contentKey(v, file, keys, func(input int, prefix string) (string, error) {
			return s.digestOf(ctx, inputs[input].snapshots[v.inputs[input].output], prefix)
		})
		if err != nil {
			return outputs{}, err
		}
		if ok {
			alias = content
		}
		if ok && !ignore {
			out, hit, err := s.lookup(ctx, v, content)
			if err != nil {
				return outputs{}, err
			}
			if hit {
				return out, s.storeAlias(ctx, v, key, content)
			}
		}
	}
	return s.run(ctx, v, key, alias, inputs)
}

func (s *session) digestOf(ctx context.Context, snap layout.SnapshotKey, prefix string) (string, error) {
	if snap == "" {
		return treeDigest(nil, prefix), nil
	}
	layers, err := s.b.Snaps.Layers(ctx, snap)
	if err != nil {
		return "", err
	}
	return treeDigest(layers, prefix), nil
}

func (s *session) storeAlias(ctx context.Context, v *vertex, key, content string) error {
	now := time.Now().UTC()
	return s.b.DB.Update(ctx, func(tx *metadata.Tx) error {
		return tx.PutCache(key, layout.CacheRecord{Alias: content, Created: now, LastUse: now, Description: v.name()})
	})
}

// run carries an operation out.
func (s *session) run(ctx context.Context, v *vertex, key, content string, inputs []outputs) (outputs, error) {
	select {
	case s.b.slots <- struct{}{}:
		defer func() { <-s.b.slots }()
	case <-ctx.Done():
		return outputs{}, ctx.Err()
	}
	s.count(v, Started)
	snaps := make([]layout.SnapshotKey, len(inputs))
	for i, in := range inputs {
		snaps[i] = in.snapshots[v.inputs[i].output]
	}
	step := &step{s: s, v: v, key: key, content: content, inputs: snaps, began: time.Now()}
	var out outputs
	var err error
	switch op := v.op.Op.(type) {
	case *pb.Op_Exec:
		out, err = step.exec(ctx, op.Exec)
	case *pb.Op_File:
		out, err = step.file(ctx, op.File)
	case *pb.Op_Merge:
		out, err = step.merge(ctx, op.Merge)
	case *pb.Op_Diff:
		out, err = step.diff(ctx, op.Diff)
	default:
		err = fmt.Errorf("an operation of type %T is not known here: %w", v.op.Op, errdefs.ErrNotImplemented)
	}
	if err != nil {
		return outputs{}, err
	}
	s.event(Event{ID: string(v.digest), Name: v.name(), State: Completed})
	return out, nil
}

// count counts a step and tells of it.
func (s *session) count(v *vertex, state State) {
	s.mu.Lock()
	s.steps++
	if state == Cached {
		s.cached++
	} else {
		s.ran++
	}
	s.mu.Unlock()
	s.event(Event{ID: string(v.digest), Name: v.name(), State: state})
}

// stepError is a failure with the line it comes from.
type stepError struct {
	line, name string
	err        error
}

func (e *stepError) Error() string {
	if e.line == "" {
		return fmt.Sprintf("%s: %v", e.name, e.err)
	}
	return fmt.Sprintf("%s: %s: %v", e.line, e.name, e.err)
}

func (e *stepError) Unwrap() error { return e.err }

// fail says which step it was.
func (s *session) fail(v *vertex, err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return err
	}
	var known *stepError
	if errors.As(err, &known) {
		return err
	}
	s.event(Event{ID: string(v.digest), Name: v.name(), State: Failed, Text: err.Error()})
	return &stepError{line: v.line, name: v.name(), err: err}
}
