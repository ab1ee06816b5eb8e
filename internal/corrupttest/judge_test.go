package corrupttest

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"varve.dev/fsck"
	"varve.dev/internal/corrupt"
	"varve.dev/layout"
)

// matches tells whether a finding is one that was foretold.
func matches(want corrupt.Finding, f fsck.Finding) bool {
	is := func(want, got string) bool { return want == "" || want == got }
	return is(want.Invariant, f.Invariant) && is(want.Object, f.Object) && is(want.Path, f.Path) &&
		(want.About == "" || strings.Contains(f.Object+"\n"+f.Path+"\n"+f.Detail, want.About))
}

// judge compares what was found with what was done.
func judge(d corrupt.Damage, found []fsck.Finding) (wrong []string) {
	among := func(want corrupt.Finding) bool {
		return slices.ContainsFunc(found, func(f fsck.Finding) bool { return matches(want, f) })
	}
	for _, want := range d.Must {
		if !among(want) {
			wrong = append(wrong, fmt.Sprintf("not found: %+v", want))
		}
	}
	if len(d.OneOf) > 0 && !slices.ContainsFunc(d.OneOf, among) {
		wrong = append(wrong, fmt.Sprintf("none of these found: %+v", d.OneOf))
	}
	foretold := slices.Concat(d.Must, d.OneOf, d.May)
	for _, f := range found {
		if !slices.ContainsFunc(foretold, func(want corrupt.Finding) bool { return matches(want, f) }) {
			wrong = append(wrong, fmt.Sprintf("cried wolf: %s %s at %q: %s", f.Invariant, f.Object, f.Path, f.Detail))
		}
	}
	return wrong
}

// exitCode is what a check has to end with, by the severities of the law.
func exitCode(found []fsck.Finding) (code int) {
	for _, f := range found {
		inv, _ := layout.FindInvariant(f.Invariant)
		switch {
		case inv.Severity == layout.Notice:
		case inv.Severity == layout.Loss && !f.Healed:
			code = 2
		default:
			code = max(code, 1)
		}
	}
	return code
}

// The judge sees what is missing and what is too much.
func TestJudge(t *testing.T) {
	d := corrupt.Damage{
		Must: []corrupt.Finding{{Invariant: "L4", Object: "layer 1", Path: "a"}},
		May:  []corrupt.Finding{{Invariant: "L4", Object: "layer 1", Path: "."}},
	}
	right := fsck.Finding{Invariant: "L4", Object: "layer 1", Path: "a"}
	dir := fsck.Finding{Invariant: "L4", Object: "layer 1", Path: "."}
	wolf := fsck.Finding{Invariant: "L4", Object: "layer 1", Path: "b"}
	number := fsck.Finding{Invariant: "L3", Object: "layer 1", Path: "a"}
	for _, c := range []struct {
		found []fsck.Finding
		wrong int
	}{
		{[]fsck.Finding{right}, 0}, {[]fsck.Finding{right, dir}, 0}, {[]fsck.Finding{dir}, 1}, {nil, 1},
		{[]fsck.Finding{right, wolf}, 1}, {[]fsck.Finding{number}, 2},
	} {
		if wrong := judge(d, c.found); len(wrong) != c.wrong {
			t.Errorf("%+v: %q", c.found, wrong)
		}
	}
	any := corrupt.Damage{OneOf: []corrupt.Finding{{Invariant: "M1"}, {Invariant: "M2"}}}
	if wrong := judge(any, []fsck.Finding{{Invariant: "M2"}}); len(wrong) > 0 {
		t.Error(wrong)
	}
	if wrong := judge(any, nil); len(wrong) != 1 {
		t.Error(wrong)
	}
}
