package builder

import (
	"context"
	"errors"
	"fmt"

	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/sourcepolicy"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"google.golang.org/protobuf/proto"

	"varve.dev/errdefs"
)

// policies are the build's own and those that came with a frontend's request.
func (j *job) policies(more []*spb.Policy) (out []*spb.Policy) {
	if j.req.Policy != nil {
		out = append(out, j.req.Policy)
	}
	for _, p := range more {
		if p != nil {
			out = append(out, p)
		}
	}
	return out
}

// allowed returns a source as the policies have it, which may be another one.
// Errors: ErrPermissionDenied.
func (j *job) allowed(ctx context.Context, op *pb.SourceOp, more []*spb.Policy) (*pb.SourceOp, error) {
	all := j.policies(more)
	if len(all) == 0 {
		return op, nil
	}
	op = proto.Clone(op).(*pb.SourceOp)
	if _, err := sourcepolicy.NewEngine(all).Evaluate(ctx, op); err != nil {
		kind := error(errdefs.ErrInvalidArgument)
		if errors.Is(err, sourcepolicy.ErrSourceDenied) {
			kind = errdefs.ErrPermissionDenied
		}
		return nil, &kindError{fmt.Errorf("error evaluating the source policy: %w", err), kind}
	}
	return op, nil
}

// applyPolicy has the sources of a graph as the policies have them.
func (j *job) applyPolicy(ctx context.Context, g *graph, more []*spb.Policy) error {
	for _, v := range g.vertices {
		op := v.op.GetSource()
		if op == nil {
			continue
		}
		now, err := j.allowed(ctx, op, more)
		if err != nil {
			return j.fail(v, err)
		}
		v.op.Op = &pb.Op_Source{Source: now}
	}
	return nil
}
