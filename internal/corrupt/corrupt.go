package corrupt

import (
	"fmt"
	"math/rand/v2"
	"slices"
)

// Finding is what a check may say. Fields that are empty stand for anything.
type Finding struct {
	Invariant string `json:"invariant,omitempty"`
	Object    string `json:"object,omitempty"`
	Path      string `json:"path,omitempty"`
	// About has to occur in the object, the path or the detail.
	About string `json:"about,omitempty"`
}

// Damage is what was done to a store.
type Damage struct {
	Kind string `json:"kind"`
	Seed uint64 `json:"seed"`
	Did  string `json:"did"` // in words
	// Must are findings each of which has to be there, OneOf some of which
	// at least one has to. May are those that the same damage explains.
	Must  []Finding `json:"must,omitempty"`
	OneOf []Finding `json:"oneOf,omitempty"`
	May   []Finding `json:"may,omitempty"`
}

// Kind is a kind of damage.
type Kind struct {
	Name string
	Does string // what, in words
	do   func(*store) error
}

// Promised are the kinds that the project's promise names, and how it calls
// them.
var Promised = []string{
	"truncate", "bit flip", "delete", "extra file", "mode", "uid", "mtime", "xattr", "link target", "whiteout to file",
	"missing directory", "missing or short blob", "orphan directory", "wrong edge", "lost record", "torn intent",
}

// Kinds returns every kind of damage, those of the promise first.
func Kinds() []Kind {
	all := slices.Concat(contentKinds, attributeKinds, nameKinds, typeKinds, blobKinds, directoryKinds, recordKinds, publicationKinds, edgeKinds, logKinds, databaseKinds)
	rank := func(k Kind) int {
		if i := slices.Index(Promised, k.Name); i >= 0 {
			return i
		}
		return len(Promised)
	}
	slices.SortStableFunc(all, func(a, b Kind) int { return rank(a) - rank(b) })
	return all
}

// Do damages the closed store in root. After an error the store may be as it
// was or not.
func Do(root, kind string, seed uint64) (Damage, error) {
	all := Kinds()
	i := slices.IndexFunc(all, func(k Kind) bool { return k.Name == kind })
	if i < 0 {
		return Damage{}, fmt.Errorf("no kind of damage is called %q", kind)
	}
	s := &store{root: root, Rand: rand.New(rand.NewPCG(seed, 0)), damage: Damage{Kind: kind, Seed: seed}}
	if err := all[i].do(s); err != nil {
		return s.damage, fmt.Errorf("%s, seed %d: %w", kind, seed, err)
	}
	return s.damage, nil
}

// must notes what has to be found.
func (s *store) must(invariant, object, path string) {
	s.damage.Must = append(s.damage.Must, Finding{Invariant: invariant, Object: object, Path: path})
}

// may notes what the damage explains.
func (s *store) may(f Finding) { s.damage.May = append(s.damage.May, f) }

// did says what was done.
func (s *store) did(format string, args ...any) { s.damage.Did = fmt.Sprintf(format, args...) }

// coin tells for every other seed.
func (s *store) coin() bool { return s.IntN(2) == 0 }

// hex returns n random hex digits.
func (s *store) hex(n int) string {
	out := make([]byte, n)
	for i := range out {
		out[i] = "0123456789abcdef"[s.IntN(16)]
	}
	return string(out)
}

// bytes returns n random bytes.
func (s *store) bytes(n int64) []byte {
	out := make([]byte, n)
	for i := range out {
		out[i] = byte(s.Uint32())
	}
	return out
}

// pickOne chooses; there has to be something to choose from.
func pickOne[T any](s *store, what string, from []T) (T, error) {
	if len(from) == 0 {
		var none T
		return none, fmt.Errorf("the store has no %s", what)
	}
	return from[s.IntN(len(from))], nil
}
