package builder

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"varve.dev/errdefs"
	"varve.dev/layer"
)

// keyVersion changes when the same operation would give another result, or
// when something else goes into a key.
const keyVersion = "varve-build-1"

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
	if p := v.op.Platform; p != nil {
		k.add(p.OS, p.Architecture, p.Variant)
	}
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

// contentKey is the key of a file operation by what it copies: its
// destination's canonical key, and for each copy the digest of the files that
// it may read. ok is false for an operation that copies nothing.
func contentKey(v *vertex, file *pb.FileOp, inputs []string, digestOf func(input int, prefix string) (string, error)) (key string, ok bool, err error) {
	sources := map[int]bool{}
	others := map[int]bool{}
	k := newKeyHash("content")
	op, _, err := relevant(v.op)
	if err != nil {
		return "", false, err
	}
	k.add(string(op))
	for _, a := range file.Actions {
		if in := int(a.Input); in >= 0 && in < len(inputs) {
			others[in] = true
		}
		c := a.GetCopy()
		in := int(a.SecondaryInput)
		if c == nil || in < 0 || in >= len(inputs) {
			continue
		}
		sources[in] = true
		d, err := digestOf(in, literalPrefix(c))
		if err != nil {
			return "", false, err
		}
		k.add(fmt.Sprint(in), d)
		for _, o := range []*pb.UserOpt{c.Owner.GetUser(), c.Owner.GetGroup()} {
			if n := o.GetByName(); n != nil {
				others[int(n.Input)] = true // names are looked up there
			}
		}
	}
	if len(sources) == 0 {
		return "", false, nil
	}
	for i, in := range inputs {
		if !sources[i] || others[i] {
			k.add("input", fmt.Sprint(i), in)
		}
	}
	return k.sum(), true, nil
}

// literalPrefix is the longest directory that a copy's source certainly lies
// in: where it has a wildcard or may lead through a link, that above.
func literalPrefix(c *pb.FileActionCopy) string {
	src := path.Clean("/" + c.Src)[1:]
	if c.AllowWildcard {
		if i := strings.IndexAny(src, `*?[\`); i >= 0 {
			src = path.Dir(src[:i] + "x")
		}
	}
	if src == "" || src == "." {
		return "."
	}
	return src
}

// treeDigest is the digest of what a stack of layers shows below prefix: names,
// types, modes, owners, link targets, xattrs and contents, and no times. If the
// way to prefix may lead through a link, it is that of everything.
func treeDigest(layers []layer.Parent, prefix string) string {
	view := layer.Merged(layers)
	for dir := prefix; dir != "."; dir = path.Dir(dir) {
		if e := view[dir]; e != nil && e.Mode&unix.S_IFMT == unix.S_IFLNK {
			prefix = "."
		}
	}
	var names []string
	for n := range view {
		if prefix == "." || n == prefix || strings.HasPrefix(n, prefix+"/") {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	k := newKeyHash("tree")
	for _, n := range names {
		e := view[n]
		k.add(n, fmt.Sprintf("%o %d %d %d", e.Mode, e.UID, e.GID, e.Rdev), e.SHA256, e.Target)
		attrs := make([]string, 0, len(e.Xattrs))
		for a := range e.Xattrs {
			attrs = append(attrs, a)
		}
		slices.Sort(attrs)
		for _, a := range attrs {
			k.add(a, e.Xattrs[a])
		}
	}
	return k.sum()
}
