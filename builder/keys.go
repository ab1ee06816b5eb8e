package builder

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"path"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/protobuf/proto"

	"varve.dev/errdefs"
)

// keyVersion changes when the same operation would give another result, or
// when something else goes into a key.
const keyVersion = "varve-build-2"

// keyHash takes the parts of a key, each with its length before it, so that
// no two lists of parts have the same bytes.
type keyHash struct{ h hash.Hash }

func newKeyHash(kind string) keyHash {
	k := keyHash{sha256.New()}
	k.add(keyVersion, kind)
	return k
}

func (k keyHash) add(parts ...string) {
	for _, p := range parts {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		k.h.Write(n[:])
		_, _ = io.WriteString(k.h, p)
	}
}

func (k keyHash) addPlatform(p *pb.Platform) {
	if p != nil {
		k.add(platforms.FormatAll(p.Spec()))
	}
}

func (k keyHash) sum() string { return hex.EncodeToString(k.h.Sum(nil)) }

// definitionKey is the key of an operation on inputs with these canonical
// keys. Of the operation goes in what may change the result: not its name, not
// the proxy that it reaches the network through, not where in the Dockerfile
// it stands.
func definitionKey(v *vertex, inputs []string) (string, error) {
	k := newKeyHash("definition")
	op, kind, err := relevant(v.op)
	if err != nil {
		return "", err
	}
	k.add(kind, string(op))
	k.addPlatform(v.op.Platform)
	k.add(inputs...)
	return k.sum(), nil
}

// relevant returns the bytes of an operation that its key is made of.
// Protocol buffers are marshalled deterministically by one version of the
// library; a new version that does it differently costs a build, no more.
func relevant(op *pb.Op) ([]byte, string, error) {
	marshal := func(m proto.Message) ([]byte, error) {
		return proto.MarshalOptions{Deterministic: true}.Marshal(m)
	}
	switch o := op.Op.(type) {
	case *pb.Op_Exec:
		e := proto.Clone(o.Exec).(*pb.ExecOp)
		if e.Meta != nil {
			e.Meta.ProxyEnv = nil
		}
		data, err := marshal(e)
		return data, "exec", err
	case *pb.Op_File:
		data, err := marshal(o.File)
		return data, "file", err
	case *pb.Op_Merge:
		data, err := marshal(o.Merge)
		return data, "merge", err
	case *pb.Op_Diff:
		data, err := marshal(o.Diff)
		return data, "diff", err
	}
	return nil, "", fmt.Errorf("an operation of type %T is not known here: %w", op.Op, errdefs.ErrNotImplemented)
}

// contentKey is the key of an operation by what it reads of its inputs: for a
// copy, or a bind mount that nothing of is kept, the digest of the files that it
// may see; for any other input its canonical key. ok is false for an operation
// that reads nothing so.
func contentKey(v *vertex, inputs []string, digestOf func(input int, all []selection) (string, error)) (key string, ok bool, err error) {
	read, whole := selections(v.op, len(inputs))
	op, err := selected(v.op)
	if err != nil {
		return "", false, err
	}
	k := newKeyHash("content")
	k.add(string(op))
	k.addPlatform(v.op.Platform)
	for i, in := range inputs {
		all := read[i]
		if whole[i] || len(all) == 0 {
			k.add("input", fmt.Sprint(i), in)
			continue
		}
		d, err := digestOf(i, all)
		if err != nil {
			return "", false, err
		}
		k.add("files", fmt.Sprint(i), d)
		ok = true
	}
	return k.sum(), ok, nil
}

// selections are the files that an operation reads of each input; whole are the
// inputs that it works on, or looks names up in.
func selections(op *pb.Op, inputs int) (read map[int][]selection, whole map[int]bool) {
	read, whole = map[int][]selection{}, map[int]bool{}
	switch o := op.Op.(type) {
	case *pb.Op_File:
		for _, a := range o.File.Actions {
			whole[int(a.Input)] = true
			if c := a.GetCopy(); c != nil && a.SecondaryInput >= 0 && int(a.SecondaryInput) < inputs {
				read[int(a.SecondaryInput)] = append(read[int(a.SecondaryInput)], selection{
					path: c.Src, wildcard: c.AllowWildcard, follow: c.FollowSymlink,
					include: c.IncludePatterns, exclude: c.ExcludePatterns, required: c.RequiredPaths,
				})
			}
			for _, o := range owners(a) {
				if n := o.GetByName(); n != nil {
					whole[int(n.Input)] = true
				}
			}
		}
	case *pb.Op_Exec:
		for _, m := range o.Exec.Mounts {
			if m.Input < 0 || int(m.Input) >= inputs {
				continue
			}
			if m.MountType == pb.MountType_BIND && m.Dest != pb.RootMount && (m.Readonly || m.Output == int64(pb.SkipOutput)) {
				read[int(m.Input)] = append(read[int(m.Input)], selection{path: m.Selector, follow: true})
			} else {
				whole[int(m.Input)] = true
			}
		}
	}
	return read, whole
}

// selected is relevant without what the digest of selected files says better:
// where a copy's source stands.
func selected(op *pb.Op) ([]byte, error) {
	if f := op.GetFile(); f != nil {
		op = proto.Clone(op).(*pb.Op)
		for _, a := range op.GetFile().Actions {
			if c := a.GetCopy(); c != nil {
				c.Src = path.Base(c.Src)
			}
		}
	}
	data, _, err := relevant(op)
	return data, err
}
