package builder

import (
	"context"
	"fmt"

	distref "github.com/distribution/reference"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/frontend/attestations/sbom"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	solverresult "github.com/moby/buildkit/solver/result"
	"golang.org/x/sync/errgroup"

	"varve.dev/errdefs"
)

// sbomWish says what lists the contents of the result, and how.
type sbomWish struct {
	generator string // an image
	params    map[string]string
	mode      string // of resolving the image
	anew      bool   // even if the result was scanned before
}

func newSBOMWish(attrs, opts map[string]string) (*sbomWish, error) {
	w := &sbomWish{params: map[string]string{}, mode: llb.ResolveModeDefault.String()}
	for k, v := range attrs {
		if k != "generator" {
			w.params[k] = v
			continue
		}
		named, err := distref.ParseNormalizedNamed(v)
		if v == "" || err != nil {
			return nil, fmt.Errorf("sbom: generator %q is no image: %w", v, errdefs.ErrInvalidArgument)
		}
		w.generator = distref.TagNameOnly(named).String()
	}
	if v, ok := opts["image-resolve-mode"]; ok {
		w.mode = v
	}
	if v, ok := opts["no-cache"]; ok && v == "" {
		w.anew = true // a list of stages would not be about the result
	}
	return w, nil
}

// scan has the results of all platforms scanned, unless the frontend did so.
func (j *job) scan(ctx context.Context, w *sbomWish, res *gwclient.Result) error {
	if sbom.HasSBOM(res) {
		return nil
	}
	ps, err := exptypes.ParsePlatforms(res.Metadata)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	// The scanner is no part of what the result is made from: its trace is
	// nobody's.
	g := &gateway{j: j, opts: map[string]string{}, trace: &trace{j: j}}
	scanner, err := sbom.CreateSBOMScanner(ctx, g, w.generator, j.platform, sourceresolver.Opt{
		ImageOpt: &sourceresolver.ResolveImageOpt{ResolveMode: w.mode, Platform: &j.platform},
	}, w.params)
	if err != nil {
		return fmt.Errorf("sbom generator %s: %w", w.generator, err)
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, p := range ps.Platforms {
		r, ok := res.FindRef(p.ID)
		if !ok {
			return fmt.Errorf("sbom: no result for platform %s: %w", p.ID, errdefs.ErrInvalidArgument)
		}
		ref, ok := r.(*reference)
		if !ok || ref == nil {
			continue
		}
		group.Go(func() error {
			a, err := g.scanOne(ctx, w, scanner, p.ID, ref)
			if err == nil {
				res.AddAttestation(p.ID, a)
			}
			return err
		})
	}
	return group.Wait()
}

func (g *gateway) scanOne(ctx context.Context, w *sbomWish, scanner sbom.Scanner, id string, ref *reference) (out gwclient.Attestation, err error) {
	state, err := ref.ToState()
	if err != nil {
		return out, err
	}
	var options []llb.ConstraintsOpt
	if w.anew {
		options = append(options, llb.IgnoreCache)
	}
	a, err := scanner(ctx, id, state, nil, options...)
	if err != nil {
		return out, fmt.Errorf("sbom generator %s: %w: %w", w.generator, err, errdefs.ErrInvalidArgument)
	}
	converted, err := solverresult.ConvertAttestation(&a, func(st *llb.State) (gwclient.Reference, error) {
		def, err := st.Marshal(ctx)
		if err != nil {
			return nil, fmt.Errorf("sbom generator %s: %w: %w", w.generator, err, errdefs.ErrInternal)
		}
		res, err := g.Solve(ctx, gwclient.SolveRequest{Definition: def.ToPB(), Evaluate: true})
		if err != nil {
			return nil, err
		}
		return res.Ref, nil
	})
	if err != nil {
		return out, err
	}
	return *converted, nil
}
