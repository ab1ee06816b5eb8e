package builder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// describe puts a definition and the texts that it comes from into a predicate,
// and returns the numbers of its steps by the digests of their vertices.
func describe(p *types.ProvenancePredicateSLSA1, def *pb.Definition) (map[string]int, error) {
	steps, numbers, err := stepsOf(def)
	if err != nil {
		return nil, err
	}
	p.BuildDefinition.InternalParameters.BuildConfig = &types.BuildConfig{Definition: steps, DigestMapping: mapping(numbers)}
	if def.Source == nil || len(def.Source.Infos) == 0 {
		return numbers, nil
	}
	src := &types.Source{Locations: map[string]*pb.Locations{}}
	for _, info := range def.Source.Infos {
		from, fromNumbers, err := stepsOf(info.Definition)
		if err != nil {
			return nil, fmt.Errorf("source of %s: %w", info.Filename, err)
		}
		src.Infos = append(src.Infos, types.SourceInfo{
			Filename: info.Filename, Language: info.Language, Data: info.Data, Definition: from, DigestMapping: mapping(fromNumbers),
		})
	}
	for d, l := range def.Source.Locations {
		if n, ok := numbers[d]; ok {
			src.Locations[stepName(n)] = l
		}
	}
	p.RunDetails.Metadata.BuildKitMetadata.Source = src
	return numbers, nil
}

func stepName(n int) string { return fmt.Sprintf("step%d", n) }

func mapping(numbers map[string]int) map[digest.Digest]string {
	out := map[digest.Digest]string{}
	for d, n := range numbers {
		out[digest.Digest(d)] = stepName(n)
	}
	return out
}

// stepsOf numbers the vertices of a definition, inputs before what uses them;
// the last one only points to the result. It is read anew: the graph that is
// solved may have other sources than were asked for.
func stepsOf(def *pb.Definition) ([]types.BuildStep, map[string]int, error) {
	if def == nil || len(def.Def) == 0 {
		return nil, nil, nil
	}
	g, err := loadGraph(def)
	if err != nil {
		return nil, nil, err
	}
	steps, numbers := []types.BuildStep{}, map[string]int{}
	var visit func(d digest.Digest)
	visit = func(d digest.Digest) {
		if _, ok := numbers[string(d)]; ok {
			return
		}
		v := g.vertices[d]
		inputs := make([]string, 0, len(v.inputs))
		for _, e := range v.inputs {
			visit(e.vertex)
			inputs = append(inputs, fmt.Sprintf("%s:%d", stepName(numbers[string(e.vertex)]), e.output))
		}
		if src := v.op.GetSource(); src != nil {
			// They are other ones in each build.
			delete(src.Attrs, pb.AttrLocalSessionID)
			delete(src.Attrs, pb.AttrLocalUniqueID)
		}
		v.op.Inputs = nil
		numbers[string(d)] = len(steps)
		steps = append(steps, types.BuildStep{ID: stepName(len(steps)), Op: v.op, Inputs: inputs})
	}
	visit(digest.FromBytes(def.Def[len(def.Def)-1]))
	return steps, numbers, nil
}

// writtenKey is the context's key for the blobs of the image being exported.
type writtenKey struct{}

// withWritten lets provenance know the layers of the image that it goes into,
// which are not in the store yet.
func withWritten(ctx context.Context, layers []*exported) context.Context {
	blobs := map[layout.SnapshotKey]ocispec.Descriptor{}
	for _, l := range layers {
		blobs[l.key] = l.desc
	}
	return context.WithValue(ctx, writtenKey{}, blobs)
}

// layers are the blobs that the results of steps consist of, by the steps'
// outputs, as far as there are any. None are made for this.
func (s *statedProvenance) layers(ctx context.Context) (map[string][][]ocispec.Descriptor, error) {
	written, _ := ctx.Value(writtenKey{}).(map[layout.SnapshotKey]ocispec.Descriptor)
	l := &layerList{j: s.j, written: written, known: map[layout.SnapshotKey][]ocispec.Descriptor{}}
	out := map[string][][]ocispec.Descriptor{}
	for d, v := range s.ref.graph.vertices {
		n, ok := s.steps[string(d)]
		if !ok || v.op.Op == nil {
			continue
		}
		snaps, err := s.j.outputsOf(ctx, v)
		if err != nil {
			return nil, err
		}
		for i, key := range snaps {
			blobs, err := l.of(ctx, key)
			if err != nil {
				return nil, err
			}
			if len(blobs) > 0 {
				out[fmt.Sprintf("%s:%d", stepName(n), i)] = [][]ocispec.Descriptor{blobs}
			}
		}
	}
	if len(out) == 0 {
		return nil, nil
	}
	return out, nil
}

// outputsOf are the results of a vertex, if the store has them. Below what was
// in the cache nothing was solved: then a step's result is looked up, and an
// image's is what its layers are called.
func (j *job) outputsOf(ctx context.Context, v *vertex) ([]layout.SnapshotKey, error) {
	j.mu.Lock()
	res, ok := j.memo[v.digest]
	key := j.keys[v.digest]
	s := j.sources[v.digest]
	j.mu.Unlock()
	if ok && res.err == nil {
		return res.out.snapshots, nil
	}
	if key != "" {
		out, _, err := j.peek(ctx, key)
		return out.snapshots, err
	}
	if s == nil {
		return nil, nil
	}
	img, ok := s.origin.(*imageOrigin)
	if !ok {
		return nil, nil
	}
	_, config, err := j.resolve(ctx, img.ref, j.platformOf(img.v), img.attrs[pb.AttrImageResolveMode])
	if err != nil {
		return nil, err
	}
	var image ocispec.Image
	if err := json.Unmarshal(config, &image); err != nil {
		return nil, fmt.Errorf("image %s: config: %w: %w", img.ref, err, errdefs.ErrInvalidArgument)
	}
	return []layout.SnapshotKey{layout.SnapshotKey(identity.ChainID(image.RootFS.DiffIDs))}, nil
}

// layerList finds the blobs of snapshots, and remembers them.
type layerList struct {
	j       *job
	written map[layout.SnapshotKey]ocispec.Descriptor
	known   map[layout.SnapshotKey][]ocispec.Descriptor
}

// of returns the blobs of a snapshot's whole chain, the bottom one first; none
// if one of them was never written.
func (l *layerList) of(ctx context.Context, top layout.SnapshotKey) (out []ocispec.Descriptor, err error) {
	if top == "" {
		return nil, nil
	}
	if known, ok := l.known[top]; ok {
		return known, nil
	}
	defer func() {
		if err == nil {
			l.known[top] = out
		}
	}()
	parent, blob, err := l.one(ctx, top)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if _, ours := l.written[top]; !ours {
		m, _, ok, err := (&writer{j: l.j}).pulled(ctx, top)
		if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			return nil, err
		}
		if ok {
			for _, d := range m.Layers {
				out = append(out, withoutInternals(d))
			}
			return out, nil
		}
	}
	if blob.Digest == "" {
		return nil, nil
	}
	below, err := l.of(ctx, parent)
	if err != nil || parent != "" && len(below) == 0 {
		return nil, err
	}
	return append(below[:len(below):len(below)], withoutInternals(blob)), nil
}

// one returns what a snapshot is on, and its own blob, if that was written.
func (l *layerList) one(ctx context.Context, key layout.SnapshotKey) (parent layout.SnapshotKey, blob ocispec.Descriptor, err error) {
	err = l.j.b.DB.View(ctx, func(tx *metadata.Tx) error {
		snap, err := tx.Snapshots().Get(key)
		if err != nil {
			return err
		}
		rec, err := tx.Layers().Get(snap.Layer)
		if err != nil {
			return err
		}
		parent = snap.Parent
		if rec.Export != nil {
			blob = *rec.Export
		}
		return nil
	})
	if d, ok := l.written[key]; ok {
		blob = d
	}
	return parent, blob, err
}

// withoutInternals takes out of a layer's annotations what engines note for
// themselves.
func withoutInternals(d ocispec.Descriptor) ocispec.Descriptor {
	notes := map[string]string{}
	for k, v := range d.Annotations {
		if k != "containerd.io/uncompressed" && k != "buildkit/createdat" && !strings.HasPrefix(k, "containerd.io/distribution.source.") {
			notes[k] = v
		}
	}
	d.Annotations = notes
	if len(notes) == 0 {
		d.Annotations = nil
	}
	return d
}
