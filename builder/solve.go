package builder

import (
	"context"
	"errors"
	"fmt"
	"time"

	bkerrdefs "github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/stack"
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
func (j *job) solve(ctx context.Context, g *graph, e edge) (layout.SnapshotKey, error) {
	out, err := j.vertex(ctx, g, e.vertex)
	if err != nil {
		return "", err
	}
	return out.output(e)
}

// output is the snapshot of one output.
func (o outputs) output(e edge) (layout.SnapshotKey, error) {
	if e.output >= len(o.snapshots) {
		return "", fmt.Errorf("vertex %s has no output %d: %w", e.vertex, e.output, errdefs.ErrInvalidArgument)
	}
	return o.snapshots[e.output], nil
}

// vertex solves a vertex once in this build, however many want it. One that was
// called off, because something beside it failed, has no result: whoever else
// wants it tries itself, for the error to tell is the failure.
func (j *job) vertex(ctx context.Context, g *graph, d digest.Digest) (outputs, error) {
	return j.solving.do(ctx, string(d), func() (outputs, error) {
		j.mu.Lock()
		known, ok := j.memo[d]
		j.mu.Unlock()
		if ok {
			return known.out, known.err
		}
		out, err := j.vertexOnce(ctx, g, g.vertices[d])
		if !errors.Is(err, context.Canceled) {
			j.mu.Lock()
			j.memo[d] = result{out, err}
			j.mu.Unlock()
		}
		return out, err
	})
}

func (j *job) vertexOnce(ctx context.Context, g *graph, v *vertex) (outputs, error) {
	if src := v.op.GetSource(); src != nil {
		out, err := j.source(ctx, v, src)
		return out, j.fail(v, err)
	}
	ignore := v.meta != nil && v.meta.IgnoreCache
	if !ignore {
		// Top-down: what is known needs nothing of what is below.
		if key, err := j.keyWithoutSolving(ctx, g, v); err == nil && key != "" {
			if out, ok, err := j.lookup(ctx, key); err != nil || ok {
				if ok {
					j.tellCached(g, v)
				}
				return out, j.fail(v, err)
			}
		}
	}
	inputs, err := j.inputs(ctx, g, v)
	if err != nil {
		return outputs{}, err // names its own line
	}
	keys := make([]string, len(inputs))
	for i, in := range inputs {
		keys[i] = inputKey(in, v.inputs[i].output)
	}
	key, err := definitionKey(v, keys)
	if err != nil {
		return outputs{}, j.fail(v, err)
	}
	// What was worked out before may have known of no alias below.
	j.mu.Lock()
	j.keys[v.digest] = key
	j.mu.Unlock()
	out, err := j.b.flights.do(ctx, key, func() (outputs, error) {
		return j.decide(ctx, v, key, keys, inputs, ignore)
	})
	if err != nil {
		return out, j.fail(v, err)
	}
	// Another build may have made it, and only that build holds it so far.
	return out, j.hold(ctx, out.snapshots)
}

// tellCached tells that a vertex was known, and so all below it is not wanted.
func (j *job) tellCached(g *graph, v *vertex) {
	told := map[*vertex]bool{}
	var tell func(v *vertex)
	tell = func(v *vertex) {
		if told[v] {
			return
		}
		told[v] = true
		for _, e := range v.inputs {
			tell(g.vertices[e.vertex])
		}
		j.progress.cached(v)
	}
	tell(v)
}

// inputKey names one output of a vertex.
func inputKey(in outputs, output int) string { return fmt.Sprintf("%s/%d", in.key, output) }

// keyWithoutSolving is the definition key by what the store knows of the
// vertices below, or "" where that is not enough to tell.
func (j *job) keyWithoutSolving(ctx context.Context, g *graph, v *vertex) (string, error) {
	j.mu.Lock()
	known := j.keys[v.digest]
	j.mu.Unlock()
	if known != "" {
		return known, nil
	}
	keys := make([]string, len(v.inputs))
	for i, e := range v.inputs {
		below := g.vertices[e.vertex]
		var canonical string
		if src := below.op.GetSource(); src != nil {
			// A source's key is its identity, which is cheap to have.
			id, err := j.sourceKey(ctx, below, src)
			if err != nil {
				return "", err
			}
			canonical = id
		} else {
			key, err := j.keyWithoutSolving(ctx, g, below)
			if err != nil || key == "" {
				return "", err
			}
			if canonical, err = j.canonical(ctx, key); err != nil {
				return "", err
			}
		}
		keys[i] = fmt.Sprintf("%s/%d", canonical, e.output)
	}
	key, err := definitionKey(v, keys)
	if err == nil {
		j.mu.Lock()
		j.keys[v.digest] = key
		j.mu.Unlock()
	}
	return key, err
}

// canonical follows the alias that is stored for a key.
func (j *job) canonical(ctx context.Context, key string) (string, error) {
	out := key
	err := j.b.DB.View(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Cache().Get(key)
		if err == nil && rec.Alias != "" {
			out = rec.Alias
		}
		return ignoreNotFound(err)
	})
	if err == nil && out == key {
		if _, rec, ok := j.imported(ctx, key); ok && rec.alias != "" {
			out = rec.alias
		}
	}
	return out, err
}

func ignoreNotFound(err error) error {
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	return err
}

// lookup takes a stored result, and holds it.
func (j *job) lookup(ctx context.Context, key string) (outputs, bool, error) {
	out, ok, err := j.peek(ctx, key)
	if err == nil && !ok {
		return j.fromImports(ctx, key)
	}
	if err != nil {
		return outputs{}, false, err
	}
	err = j.lease.Hold(ctx, func(tx *metadata.Tx) ([]layout.Node, error) {
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
	return out, true, nil
}

// cached is a row of the cache; an empty one if there is none.
func (j *job) cached(ctx context.Context, key string) (rec layout.CacheRecord, err error) {
	err = j.b.DB.View(ctx, func(tx *metadata.Tx) (err error) {
		rec, err = tx.Cache().Get(key)
		return ignoreNotFound(err)
	})
	return rec, err
}

// peek looks a result up without holding it.
func (j *job) peek(ctx context.Context, key string) (out outputs, ok bool, err error) {
	err = j.b.DB.View(ctx, func(tx *metadata.Tx) error {
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
func (j *job) inputs(ctx context.Context, g *graph, v *vertex) ([]outputs, error) {
	out := make([]outputs, len(v.inputs))
	group, ctx := errgroup.WithContext(ctx)
	for i, e := range v.inputs {
		group.Go(func() (err error) {
			out[i], err = j.vertex(ctx, g, e.vertex)
			return err
		})
	}
	return out, group.Wait()
}

// decide looks once more, with all inputs known, and runs the operation if
// that does not help.
func (j *job) decide(ctx context.Context, v *vertex, key string, keys []string, inputs []outputs, ignore bool) (outputs, error) {
	if !ignore {
		if out, ok, err := j.lookup(ctx, key); err != nil || ok {
			if ok {
				j.progress.cached(v)
			}
			return out, err
		}
	}
	alias := ""
	content, ok, err := contentKey(v, keys, func(input int, all []selection) (string, error) {
		snap, err := inputs[input].output(v.inputs[input])
		if err != nil {
			return "", err
		}
		return j.digestOf(ctx, snap, all)
	})
	if err != nil {
		return outputs{}, fmt.Errorf("failed to compute cache key: %w", err)
	}
	if ok {
		alias = content
	}
	if ok && !ignore {
		out, hit, err := j.lookup(ctx, content)
		if err != nil {
			return outputs{}, err
		}
		if hit {
			j.progress.cached(v)
			return out, j.storeAlias(ctx, v, key, content)
		}
	}
	return j.run(ctx, v, key, alias, inputs)
}

func (j *job) storeAlias(ctx context.Context, v *vertex, key, content string) error {
	now := time.Now().UTC()
	return j.b.DB.Update(ctx, func(tx *metadata.Tx) error {
		return tx.PutCache(key, layout.CacheRecord{Alias: content, Created: now, LastUse: now, Description: v.name()})
	})
}

// run carries an operation out.
func (j *job) run(ctx context.Context, v *vertex, key, content string, inputs []outputs) (outputs, error) {
	select {
	case j.b.slots <- struct{}{}:
		defer func() { <-j.b.slots }()
	case <-ctx.Done():
		return outputs{}, ctx.Err()
	}
	j.progress.begin(v)
	snaps := make([]layout.SnapshotKey, len(inputs))
	for i, in := range inputs {
		var err error
		if snaps[i], err = in.output(v.inputs[i]); err != nil {
			return outputs{}, err
		}
	}
	step := &step{j: j, v: v, key: key, content: content, inputs: snaps, began: time.Now()}
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
	if err == nil {
		j.progress.end(v, nil)
	}
	return out, err
}

// stepError is a failure with the line it comes from.
type stepError struct {
	line, name string
	err        error
}

func (e *stepError) Error() string { return e.err.Error() }

func (e *stepError) Unwrap() error { return e.err }

// fail says which step it was, and where it is written, in the details that
// BuildKit's clients show.
func (j *job) fail(v *vertex, err error) error {
	if err == nil {
		return nil
	}
	j.progress.end(v, err)
	var known *stepError
	if errors.As(err, &known) || errors.Is(err, context.Canceled) {
		return err
	}
	err = &stepError{line: v.line, name: v.name(), err: err}
	for _, s := range v.sources {
		err = bkerrdefs.WithSource(err, s)
	}
	return stack.Enable(bkerrdefs.WrapVertex(stack.Enable(err), v.digest))
}
