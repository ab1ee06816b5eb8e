package builder

import (
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/layer"
)

// viewOfFiles is a tree of files with their names as contents, directories (with
// a slash at the end) and links (NAME -> TARGET).
func viewOfFiles(links map[string]string, names ...string) *treeView {
	m := &layer.Manifest{}
	for _, n := range names {
		e := layer.Entry{Names: []string{n}, Mode: unix.S_IFREG | 0o644, SHA256: n}
		if n[len(n)-1] == '/' {
			e = layer.Entry{Names: []string{n[:len(n)-1]}, Mode: unix.S_IFDIR | 0o755}
		}
		m.Entries = append(m.Entries, e)
	}
	for n, target := range links {
		m.Entries = append(m.Entries, layer.Entry{Names: []string{n}, Mode: unix.S_IFLNK | 0o777, Target: target})
	}
	return newTreeView([]layer.Parent{{Manifest: m}})
}

// Links lead where they do in a container: never out of the tree.
func TestPathsAreResolvedInTheTree(t *testing.T) {
	view := viewOfFiles(map[string]string{
		"abs": "/d/f", "rel": "d", "up": "../../d", "d/back": "../e", "loop": "loop", "dangling": "nowhere",
	}, "d/", "d/f", "e/", "e/g")
	for _, c := range []struct {
		path   string
		follow bool
		want   string // "" for an error
	}{
		{"/", true, "."}, {"d/f", true, "d/f"}, {"/abs", true, "d/f"}, {"/abs", false, "abs"}, {"rel/f", false, "d/f"},
		{"up/f", true, "d/f"}, {"d/back/g", true, "e/g"}, {"../../e/g", true, "e/g"}, {"loop", true, ""}, {"loop/x", false, ""},
		{"dangling", true, ""}, {"dangling", false, "dangling"}, {"d/none", true, ""}, {"d/f/x", true, ""},
	} {
		got, err := view.resolve(c.path, c.follow)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%q (follow %t): %q, %v; want %q", c.path, c.follow, got, err, c.want)
		}
	}
}

func TestSelectionsMatch(t *testing.T) {
	view := viewOfFiles(nil, "a", "a-b", "a.go", "d/", "d/a.go", "d/e/", "d/e/a.go")
	for _, c := range []struct {
		path string
		want []string
	}{
		{"*.go", []string{"a.go"}}, {"*/*.go", []string{"d/a.go"}}, {"d/*", []string{"d/a.go", "d/e"}}, {"a*", []string{"a", "a-b", "a.go"}},
		{"none*", nil}, {"none/*", nil}, {"d/e", []string{"d/e"}},
	} {
		got, err := view.matches(selection{path: c.path, wildcard: true})
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%q: %q, %v; want %q", c.path, got, err, c.want)
		}
	}
	if _, err := view.matches(selection{path: "none"}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("a path that is not there: %v", err)
	}
	if got := view.below("a"); !slices.Equal(got, []string{"a"}) {
		t.Errorf("below a file: %q", got)
	}
}

// What is not selected does not change the digest, and what is does.
func TestSelectionsDigest(t *testing.T) {
	all := selection{path: "/"}
	for _, c := range []struct {
		name     string
		of       selection
		change   string
		matters  bool
		required []string
	}{
		{name: "beside a path", of: selection{path: "d"}, change: "a"},
		{name: "below a path", of: selection{path: "d"}, change: "d/a.go", matters: true},
		{name: "outside a pattern", of: selection{path: "*.go", wildcard: true}, change: "d/a.go"},
		{name: "in a pattern", of: selection{path: "d/*.go", wildcard: true}, change: "d/a.go", matters: true},
		{name: "excluded", of: selection{path: "/", exclude: []string{"d/e"}}, change: "d/e/a.go"},
		{name: "excluded but for some", of: selection{path: "/", exclude: []string{"d", "!d/e"}}, change: "d/e/a.go", matters: true},
		{name: "not included", of: selection{path: "/", include: []string{"d/*.go"}}, change: "a.go"},
		{name: "included", of: selection{path: "/", include: []string{"d/*.go"}}, change: "d/a.go", matters: true},
		{name: "everything", of: all, change: "a", matters: true},
	} {
		names := []string{"a", "a.go", "d/", "d/a.go", "d/e/", "d/e/a.go"}
		before, err := viewOfFiles(nil, names...).digest([]selection{c.of})
		if err != nil {
			t.Fatal(err)
		}
		view := viewOfFiles(nil, names...)
		view.entries[c.change].SHA256 = "changed"
		after, err := view.digest([]selection{c.of})
		if err != nil {
			t.Fatal(err)
		}
		if (before != after) != c.matters {
			t.Errorf("%s: the digest changed: %t", c.name, before != after)
		}
	}
	if _, err := viewOfFiles(nil, "a").digest([]selection{{path: "/", required: []string{"b"}}}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("what is required and not there: %v", err)
	}
}
