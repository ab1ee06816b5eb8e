package layout_test

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// sources parses every file of the project that keep chooses.
func sources(t *testing.T, keep func(rel string) bool) map[string]*ast.File {
	t.Helper()
	out := map[string]*ast.File{}
	err := filepath.WalkDir("..", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel("..", name)
		if d.IsDir() && rel != "." && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(rel, ".go") || !keep(rel) {
			return nil
		}
		out[rel], err = parser.ParseFile(token.NewFileSet(), name, nil, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// pointConstants returns the fault points that transitions.go declares, by the
// names of their constants.
func pointConstants(t *testing.T) map[string]string {
	t.Helper()
	points := map[string]string{}
	for _, file := range sources(t, func(rel string) bool { return rel == "layout/transitions.go" }) {
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.ValueSpec)
			if ok && len(spec.Values) == 1 && strings.HasPrefix(spec.Names[0].Name, "Point") {
				value, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				points[spec.Names[0].Name] = value
			}
			return true
		})
	}
	return points
}

// Each fault point belongs to one transition, and stands in the code that gets
// into that state; there is no other.
func TestFaultPointsAreThoseOfTheTable(t *testing.T) {
	points := pointConstants(t)
	var declared, listed []string
	for _, value := range points {
		declared = append(declared, value)
	}
	for _, tr := range layout.Transitions() {
		listed = append(listed, tr.Point)
	}
	slices.Sort(declared)
	slices.Sort(listed)
	if len(declared) == 0 || !slices.Equal(declared, listed) {
		t.Errorf("declared: %v\nin the table: %v", declared, listed)
	}
	placed := map[string]int{}
	for rel, file := range sources(t, func(rel string) bool { return !strings.HasSuffix(rel, "_test.go") }) {
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) != 1 {
				return true
			}
			fun, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || fun.Sel.Name != "At" {
				return true
			}
			if base, ok := fun.X.(*ast.Ident); !ok || base.Name != "durable" {
				return true
			}
			arg, ok := call.Args[0].(*ast.SelectorExpr)
			if !ok || points[arg.Sel.Name] == "" {
				t.Errorf("%s: a fault point that is no constant of layout", rel)
				return true
			}
			placed[arg.Sel.Name]++
			return true
		})
	}
	for name := range points {
		if placed[name] == 0 {
			t.Errorf("%s is placed nowhere", name)
		}
	}
}

// The witness has a check for every invariant, and reports no other.
func TestEveryInvariantHasItsCheck(t *testing.T) {
	named := map[string]bool{}
	for _, file := range sources(t, func(rel string) bool {
		return strings.HasPrefix(rel, "fsck/") && !strings.HasSuffix(rel, "_test.go")
	}) {
		ast.Inspect(file, func(n ast.Node) bool {
			if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				if s, err := strconv.Unquote(lit.Value); err == nil {
					named[s] = true
				}
			}
			return true
		})
	}
	for _, inv := range layout.Invariants() {
		if !named[inv.ID] {
			t.Errorf("package fsck never names invariant %s", inv.ID)
		}
	}
	for s := range named {
		if len(s) == 2 && s[0] >= 'A' && s[0] <= 'Z' && s[1] >= '1' && s[1] <= '9' {
			if _, ok := layout.FindInvariant(s); !ok {
				t.Errorf("package fsck names invariant %s, which is not in the law", s)
			}
		}
	}
}

func TestEdgeKeys(t *testing.T) {
	e := layout.Edge{Parent: layout.ImageNode("a/b:c"), Rel: layout.RelTarget, Child: layout.BlobNode("sha256:00")}
	if got, err := layout.ParseEdge(e.Key()); err != nil || got != e {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := layout.ParseBackEdge(e.BackKey()); err != nil || got != e {
		t.Errorf("%+v, %v", got, err)
	}
	if kind, id := e.Parent.Split(); kind != layout.KindImage || id != "a/b:c" {
		t.Errorf("split into %q and %q", kind, id)
	}
	for _, key := range []string{"", "a", "a\x00b", "a\x00b\x00c\x00d"} {
		if _, err := layout.ParseEdge([]byte(key)); !errors.Is(err, errdefs.ErrDataLoss) {
			t.Errorf("%q: %v", key, err)
		}
	}
	for _, name := range []string{"", "a\x00b", strings.Repeat("x", 9000)} {
		if err := layout.CheckName("name", name); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%.10q: %v", name, err)
		}
	}
}

// Whatever bytes are under a key, reading them gives a record or says M1.
func FuzzDecodeRecord(f *testing.F) {
	for _, rec := range []any{layout.IntentRecord{}, layout.BlobRecord{Size: 1}, layout.LayerRecord{DiffID: "d"}, layout.MetaRecord{Format: 1}} {
		value, err := layout.Encode("key", rec)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(value[4:], true)
		f.Add(value, false)
	}
	f.Fuzz(func(t *testing.T, value []byte, summed bool) {
		if summed { // get behind the checksum too
			sum, err := layout.Encode("key", jsonText(value))
			if err != nil {
				return
			}
			value = sum
		}
		for _, rec := range []any{
			&layout.IntentRecord{}, &layout.BlobRecord{}, &layout.LayerRecord{}, &layout.SnapshotRecord{}, &layout.ImageRecord{},
			&layout.ContainerRecord{}, &layout.LeaseRecord{}, &layout.CacheRecord{}, &layout.SweepRecord{}, &layout.MetaRecord{},
		} {
			err := layout.Decode("bucket", "key", value, rec)
			if c := errdefs.AsCorrupt(err); err != nil && (c == nil || c.Invariant != "M1") {
				t.Errorf("%T: %v", rec, err)
			}
			if err != nil {
				continue
			}
			// What decodes can be stored, and reads the same.
			again, err := layout.Encode("key", rec)
			if err != nil {
				t.Errorf("%T: %v", rec, err)
			} else if err := layout.Decode("bucket", "key", again, rec); err != nil {
				t.Errorf("%T: %v", rec, err)
			}
		}
	})
}

// jsonText is JSON that is stored as it is.
type jsonText []byte

func (j jsonText) MarshalJSON() ([]byte, error) { return j, nil }

func FuzzParseEdge(f *testing.F) {
	f.Add([]byte("blob:sha256:00\x00target\x00image:x"))
	f.Fuzz(func(t *testing.T, key []byte) {
		e, err := layout.ParseEdge(key)
		if err != nil {
			if !errors.Is(err, errdefs.ErrDataLoss) {
				t.Error(err)
			}
			return
		}
		if string(e.Key()) != string(key) {
			t.Errorf("%q reads %+v", key, e)
		}
		if back, err := layout.ParseBackEdge(e.BackKey()); err != nil || back != e {
			t.Errorf("back: %+v, %v", back, err)
		}
	})
}
