package builder

import (
	"fmt"
	"strings"

	bkerrdefs "github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	"varve.dev/errdefs"
)

// graph is an LLB definition, checked. Vertices are named by the digests of
// their bytes, so it has no circles.
type graph struct {
	root     edge
	vertices map[digest.Digest]*vertex
}

// edge is one output of a vertex.
type edge struct {
	vertex digest.Digest
	output int
}

// vertex is one operation.
type vertex struct {
	digest digest.Digest
	op     *pb.Op
	meta   *pb.OpMetadata
	inputs []edge
	line   string // "Dockerfile:7", or "" where nothing is known
	// sources are where in which texts it is written.
	sources []*bkerrdefs.Source
	// base tells that others write on what the vertex makes: its layers will
	// be those of an image.
	base bool
}

// maxVertices bounds what a frontend may hand over.
const maxVertices = 100_000

// loadGraph reads a definition. The last of its vertices has no operation; it
// points to the result. Errors: ErrInvalidArgument.
func loadGraph(def *pb.Definition) (*graph, error) {
	if len(def.Def) > maxVertices {
		return nil, fmt.Errorf("definition has %d vertices, more than %d: %w", len(def.Def), maxVertices, errdefs.ErrInvalidArgument)
	}
	g := &graph{vertices: map[digest.Digest]*vertex{}}
	var last *vertex
	for i, data := range def.Def {
		v := &vertex{digest: digest.FromBytes(data), op: &pb.Op{}}
		if err := proto.Unmarshal(data, v.op); err != nil {
			return nil, fmt.Errorf("vertex %d of the definition: %w: %w", i, err, errdefs.ErrInvalidArgument)
		}
		for _, in := range v.op.Inputs {
			d := digest.Digest(in.Digest)
			if g.vertices[d] == nil {
				return nil, fmt.Errorf("vertex %s uses %s, which does not come before it: %w", v.digest, d, errdefs.ErrInvalidArgument)
			}
			if in.Index < 0 {
				return nil, fmt.Errorf("vertex %s uses output %d: %w", v.digest, in.Index, errdefs.ErrInvalidArgument)
			}
			v.inputs = append(v.inputs, edge{d, int(in.Index)})
		}
		v.meta = def.Metadata[string(v.digest)]
		v.line, v.sources = lineOf(def, v.digest), sourcesOf(def, v.digest)
		g.vertices[v.digest] = v
		last = v
	}
	if last == nil || last.op.Op != nil || len(last.inputs) != 1 {
		return nil, fmt.Errorf("the definition does not end in its result: %w", errdefs.ErrInvalidArgument)
	}
	g.root = last.inputs[0]
	for _, v := range g.vertices {
		for _, in := range writtenOn(v.op) {
			if in >= 0 && int(in) < len(v.inputs) {
				g.vertices[v.inputs[in].vertex].base = true
			}
		}
	}
	return g, nil
}

// writtenOn are the inputs that an operation puts layers on.
func writtenOn(op *pb.Op) (inputs []int64) {
	switch o := op.Op.(type) {
	case *pb.Op_Exec:
		for _, m := range o.Exec.Mounts {
			if m.Dest == pb.RootMount || m.Output >= 0 && !m.Readonly {
				inputs = append(inputs, m.Input)
			}
		}
	case *pb.Op_File:
		for _, a := range o.File.Actions {
			inputs = append(inputs, a.Input)
		}
	case *pb.Op_Merge:
		for _, in := range o.Merge.Inputs {
			inputs = append(inputs, in.GetInput())
		}
	case *pb.Op_Diff:
		inputs = append(inputs, o.Diff.Lower.GetInput(), o.Diff.Upper.GetInput())
	}
	return inputs
}

// isLocal tells whether the result is a directory of the client.
func (g *graph) isLocal() bool {
	v := g.vertices[g.root.vertex]
	_, ok := cutScheme(v.op.GetSource().GetIdentifier(), schemeLocal)
	return ok
}

// lineOf is where in the Dockerfile a vertex comes from.
func lineOf(def *pb.Definition, d digest.Digest) string {
	if def.Source == nil || def.Source.Locations[string(d)] == nil {
		return ""
	}
	for _, l := range def.Source.Locations[string(d)].Locations {
		if int(l.SourceIndex) < len(def.Source.Infos) && len(l.Ranges) > 0 {
			return fmt.Sprintf("%s:%d", def.Source.Infos[l.SourceIndex].Filename, l.Ranges[0].Start.Line)
		}
	}
	return ""
}

// sourcesOf are the texts and ranges that a vertex comes from.
func sourcesOf(def *pb.Definition, d digest.Digest) (out []*bkerrdefs.Source) {
	if def.Source == nil || def.Source.Locations[string(d)] == nil {
		return nil
	}
	for _, l := range def.Source.Locations[string(d)].Locations {
		if l != nil && l.SourceIndex >= 0 && int(l.SourceIndex) < len(def.Source.Infos) {
			out = append(out, &bkerrdefs.Source{Info: def.Source.Infos[l.SourceIndex], Ranges: l.Ranges})
		}
	}
	return out
}

// customName is where a frontend says what a vertex is called.
const customName = "llb.customname"

// name is what people call the vertex.
func (v *vertex) name() string {
	if v.meta != nil {
		if n := v.meta.Description[customName]; n != "" {
			return n
		}
	}
	switch op := v.op.GetOp().(type) {
	case *pb.Op_Source:
		return op.Source.Identifier
	case *pb.Op_Exec:
		return strings.Join(op.Exec.GetMeta().GetArgs(), " ")
	case *pb.Op_File:
		return fileName(op.File.Actions)
	case *pb.Op_Merge:
		return fmt.Sprintf("merge %d trees", len(op.Merge.Inputs))
	case *pb.Op_Diff:
		return "diff two trees"
	}
	return v.digest.Encoded()[:12]
}

func fileName(actions []*pb.FileAction) string {
	var names []string
	for _, a := range actions {
		switch x := a.Action.(type) {
		case *pb.FileAction_Mkdir:
			names = append(names, "mkdir "+x.Mkdir.Path)
		case *pb.FileAction_Mkfile:
			names = append(names, "mkfile "+x.Mkfile.Path)
		case *pb.FileAction_Symlink:
			names = append(names, "symlink "+x.Symlink.Newpath+" -> "+x.Symlink.Oldpath)
		case *pb.FileAction_Rm:
			names = append(names, "rm "+x.Rm.Path)
		case *pb.FileAction_Copy:
			names = append(names, "copy "+x.Copy.Src+" "+x.Copy.Dest)
		}
	}
	return strings.Join(names, ", ")
}
