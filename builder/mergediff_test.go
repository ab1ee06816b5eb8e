package builder

import (
	"fmt"
	"slices"
	"testing"

	"github.com/moby/buildkit/client/llb"
)

func file(name, data string) *llb.FileAction {
	return llb.Mkfile(name, 0o644, []byte(data), llb.WithCreatedTime(made))
}

func dir(name string) *llb.FileAction {
	return llb.Mkdir(name, 0o755, llb.WithParents(true), llb.WithCreatedTime(made))
}

func scratch(a ...*llb.FileAction) llb.State {
	st := llb.Scratch()
	for _, x := range a {
		st = st.File(x)
	}
	return st
}

func TestMerge(t *testing.T) {
	b := newBuilder(t)
	base := scratch(dir("/etc/app"), file("/etc/app/old", "old"), file("/etc/hosts", "hosts"), file("/plain", "1"))
	for _, c := range []struct {
		what   string
		merged llb.State
		want   []string
	}{
		{"what is in one of them only", llb.Merge([]llb.State{base, scratch(dir("/opt"), file("/opt/x", "x"))}),
			[]string{"etc", "etc/app", "etc/app/old", "etc/hosts", "opt", "opt/x", "plain"}},
		{"a directory of both shows both", llb.Merge([]llb.State{base, scratch(dir("/etc/app"), file("/etc/app/new", "new"))}),
			[]string{"etc", "etc/app", "etc/app/new", "etc/app/old", "etc/hosts", "plain"}},
		{"a directory instead of a file", llb.Merge([]llb.State{base, scratch(dir("/plain"), file("/plain/x", ""))}),
			[]string{"etc", "etc/app", "etc/app/old", "etc/hosts", "plain", "plain/x"}},
		{"a file instead of a directory", llb.Merge([]llb.State{base, scratch(file("/etc", "a file"))}),
			[]string{"etc", "plain"}},
		{"a removal", llb.Merge([]llb.State{base, llb.Diff(base, base.File(llb.Rm("/etc/app")))}),
			[]string{"etc", "etc/hosts", "plain"}},
		{"a directory that was new where it was made hides nothing elsewhere",
			llb.Merge([]llb.State{scratch(dir("/srv/data"), file("/srv/data/theirs", "")), llb.Diff(base, base.File(dir("/srv/data")).File(file("/srv/data/ours", "")))}),
			[]string{"srv", "srv/data", "srv/data/ours", "srv/data/theirs"}},
		{"three, the last one wins", llb.Merge([]llb.State{base, scratch(file("/plain", "2")), scratch(file("/plain", "3"))}),
			[]string{"etc", "etc/app", "etc/app/old", "etc/hosts", "plain"}},
		{"nothing on something", llb.Merge([]llb.State{base, llb.Diff(base, base.File(file("/x", "")).File(llb.Rm("/x")))}),
			[]string{"etc", "etc/app", "etc/app/old", "etc/hosts", "plain"}},
		{"something on nothing", llb.Merge([]llb.State{llb.Diff(base, base), scratch(file("/x", ""))}),
			[]string{"x"}},
	} {
		if got := names(shown(t, b, solved(t, begun(t, b), c.merged))); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.what, got, c.want)
		}
	}
}

// Whatever two trees are, and whether one was made from the other or not, the
// difference put on the lower one makes the upper one.
func TestDifferenceMakesUpper(t *testing.T) {
	b := newBuilder(t)
	for seed := range uint64(40) {
		j := begun(t, b)
		pen := newScribbler(seed)
		base := pen.change(scratch(dir("/base")), 3)
		left := pen.fork(seed+1000).change(base, 3)
		right := pen.fork(seed+2000).change(base, 3)
		for what, pair := range map[string][2]llb.State{
			"a descendant": {base, right}, "an ancestor": {right, base}, "a cousin": {left, right},
			"a stranger": {left, newScribbler(seed+3000).change(scratch(dir("/other")), 4)},
		} {
			upper := lines(shown(t, b, solved(t, j, pair[1])))
			merged := lines(shown(t, b, solved(t, j, llb.Merge([]llb.State{pair[0], llb.Diff(pair[0], pair[1])}))))
			if !slices.Equal(merged, upper) {
				t.Errorf("seed %d, %s: lower with the difference is\n%q, upper\n%q", seed, what, merged, upper)
			}
		}
	}
}

// A merge copies no files, and is found again; what is merged stays known when
// what it is merged onto changes.
func TestMergeInTheCache(t *testing.T) {
	b := newBuilder(t)
	part := scratch(dir("/opt"), file("/opt/x", "x"))
	on := func(version string) llb.State {
		return llb.Merge([]llb.State{scratch(file("/base", version)), part})
	}
	for i, c := range []struct {
		version     string
		ran, cached int
	}{
		{"1", 4, 0}, // the base, two steps of the part, the merge
		{"1", 0, 4}, // the merge is known, and so is all below it
		{"2", 2, 2}, // the new base and the merge; the part is known
	} {
		var told tally
		j := begunFor(t, b, Request{Progress: told.tell})
		key := solved(t, j, on(c.version))
		if told.ran != c.ran || told.cached != c.cached {
			t.Errorf("build %d: %d run, %d cached; want %d, %d", i, told.ran, told.cached, c.ran, c.cached)
		}
		ids, err := b.Snaps.LayerIDs(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		parts, err := b.Snaps.LayerIDs(t.Context(), solved(t, j, part))
		if err != nil {
			t.Fatal(err)
		}
		if len(ids) != 3 || !slices.Equal(ids[1:], parts) {
			t.Errorf("build %d: layers %v do not end in the part's, %v", i, ids, parts)
		}
	}
}

// A stack that overlayfs could not show is refused.
func TestMergeOfTooMany(t *testing.T) {
	b := newBuilder(t)
	part := llb.Scratch()
	for i := range 6 {
		part = part.File(file(fmt.Sprintf("/%d", i), ""))
	}
	all := make([]llb.State, 100)
	for i := range all {
		all[i] = part
	}
	g := loaded(t, llb.Merge(all))
	if _, err := begun(t, b).solve(t.Context(), g, g.root); err == nil {
		t.Error("600 layers were merged")
	} else {
		t.Log(err)
	}
}
