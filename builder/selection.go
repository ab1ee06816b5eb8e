package builder

import (
	"context"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/moby/patternmatcher"
	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/layer"
	"varve.dev/layout"
)

// selection says which files of a tree an operation reads: a path, or all that a
// pattern matches, with what is below.
type selection struct {
	path             string
	wildcard, follow bool
	include, exclude []string // patterns of what is below, as in .dockerignore
	required         []string // paths of the tree that have to be there
}

// everything selects a whole tree.
var everything = []selection{{path: "/"}}

// treeView is what a stack of layers shows, by its file manifests.
type treeView struct {
	entries map[string]*layer.Entry
	names   []string // in order
}

func newTreeView(layers []layer.Parent) *treeView {
	t := &treeView{entries: layer.Merged(layers)}
	t.names = make([]string, 0, len(t.entries))
	for n := range t.entries {
		t.names = append(t.names, n)
	}
	slices.Sort(t.names)
	return t
}

// maxLinks is how many links a path may lead through.
const maxLinks = 255

// resolve follows the links of a path; the last element's only if follow is
// set. Errors: fs.ErrNotExist.
func (t *treeView) resolve(p string, follow bool) (string, error) {
	left := strings.Split(path.Clean("/" + p)[1:], "/")
	at := "."
	for links := 0; len(left) > 0; {
		next := left[0]
		left = left[1:]
		switch next {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at)
			continue
		}
		name := path.Join(at, next)
		e := t.entries[name]
		if e == nil {
			return "", fs.ErrNotExist
		}
		if e.Mode&unix.S_IFMT != unix.S_IFLNK || len(left) == 0 && !follow {
			at = name
			continue
		}
		if links++; links > maxLinks {
			return "", fs.ErrNotExist
		}
		if path.IsAbs(e.Target) {
			at = "."
		}
		left = append(strings.Split(e.Target, "/"), left...)
	}
	return at, nil
}

// below are the names at and below one.
func (t *treeView) below(name string) []string {
	if name == "." {
		return t.names
	}
	i, _ := slices.BinarySearch(t.names, name)
	if i < len(t.names) && t.names[i] == name {
		// Names that only begin alike ("a-b" beside "a") stand between.
		out := []string{name}
		j, _ := slices.BinarySearch(t.names, name+"/")
		for ; j < len(t.names) && strings.HasPrefix(t.names[j], name+"/"); j++ {
			out = append(out, t.names[j])
		}
		return out
	}
	return nil
}

// matches are the names that a selection begins at.
func (t *treeView) matches(s selection) ([]string, error) {
	dir, pattern := splitPattern(s.path)
	if !s.wildcard || pattern == "" {
		name, err := t.resolve(s.path, s.follow)
		if err != nil {
			return nil, missing(s.path)
		}
		return []string{name}, nil
	}
	base, err := t.resolve(dir, true)
	if err != nil {
		return nil, nil
	}
	var out []string
	for _, n := range t.below(base) {
		rel := n
		if base != "." {
			rel = strings.TrimPrefix(strings.TrimPrefix(n, base), "/")
		}
		if strings.Count(rel, "/") != strings.Count(pattern, "/") {
			continue
		}
		if ok, err := path.Match(pattern, rel); err != nil || !ok || rel == "" {
			continue
		}
		if s.follow {
			if to, err := t.resolve(n, true); err == nil {
				n = to
			}
		}
		out = append(out, n)
	}
	return out, nil
}

// splitPattern splits a path into the directory that has no wildcard and the
// rest, which begins with one that has.
func splitPattern(p string) (dir, pattern string) {
	parts := strings.Split(path.Clean("/" + p)[1:], "/")
	for i, part := range parts {
		if strings.ContainsAny(part, `*?[\`) {
			return path.Join(parts[:i]...), path.Join(parts[i:]...)
		}
	}
	return path.Join(parts...), ""
}

// missing is the error for a path that is not there, in BuildKit's words.
func missing(p string) error {
	return fmt.Errorf("%q: %w", path.Clean("/"+p), errdefs.ErrNotFound)
}

// digest is that of the files that are selected: names from where the selection
// begins, types, modes, owners, link targets, xattrs and contents, and no times.
// Errors: ErrNotFound for a path that is not there.
func (t *treeView) digest(all []selection) (string, error) {
	k := newKeyHash("tree")
	for _, s := range all {
		begin, err := t.matches(s)
		if err != nil {
			return "", err
		}
		for _, p := range s.required {
			if _, err := t.resolve(p, true); err != nil {
				return "", missing(p)
			}
		}
		wanted, err := s.filter()
		if err != nil {
			return "", err
		}
		k.add("selection", fmt.Sprint(len(begin)))
		for _, name := range begin {
			if s.wildcard {
				k.add(path.Base(name))
			}
			for _, n := range t.below(name) {
				rel := n
				if name != "." {
					rel = strings.TrimPrefix(strings.TrimPrefix(n, name), "/")
				}
				if e := t.entries[n]; wanted(rel, e) {
					k.addEntry(rel, e)
				}
			}
		}
	}
	return k.sum(), nil
}

// filter tells what below a selection is read. It may let through more than is:
// that costs a step, no more.
func (s selection) filter() (func(rel string, e *layer.Entry) bool, error) {
	matcher := func(patterns []string) (*patternmatcher.PatternMatcher, error) {
		if len(patterns) == 0 || slices.ContainsFunc(patterns, func(p string) bool { return strings.HasPrefix(p, "!") }) {
			return nil, nil
		}
		m, err := patternmatcher.New(patterns)
		if err != nil {
			return nil, fmt.Errorf("pattern: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		return m, nil
	}
	include, err := matcher(s.include)
	if err != nil {
		return nil, err
	}
	exclude, err := matcher(s.exclude)
	if err != nil {
		return nil, err
	}
	matched := func(m *patternmatcher.PatternMatcher, rel string) bool {
		ok, err := m.MatchesOrParentMatches(rel)
		return err == nil && ok
	}
	return func(rel string, e *layer.Entry) bool {
		switch {
		case rel == "" || rel == ".":
			return true
		case exclude != nil && matched(exclude, rel):
			return false
		case include == nil || matched(include, rel):
			return true
		}
		return e.Mode&unix.S_IFMT == unix.S_IFDIR // something below may be included
	}, nil
}

func (k keyHash) addEntry(name string, e *layer.Entry) {
	k.add(name, fmt.Sprintf("%o %d %d %d", e.Mode, e.UID, e.GID, e.Rdev), e.SHA256, e.Target)
	attrs := make([]string, 0, len(e.Xattrs))
	for a := range e.Xattrs {
		attrs = append(attrs, a)
	}
	slices.Sort(attrs)
	for _, a := range attrs {
		k.add(a, e.Xattrs[a])
	}
}

// keptViews is how many trees a build has in memory by their file manifests.
const keptViews = 4

// view is what a snapshot shows. The last ones are kept.
func (j *job) view(ctx context.Context, snap layout.SnapshotKey) (*treeView, error) {
	j.mu.Lock()
	for _, v := range j.views {
		if v.snap == snap {
			j.mu.Unlock()
			return v.view, nil
		}
	}
	j.mu.Unlock()
	var layers []layer.Parent
	if snap != "" {
		var err error
		if layers, err = j.b.Snaps.Layers(ctx, snap); err != nil {
			return nil, err
		}
	}
	v := viewOf{snap, newTreeView(layers)}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.views = append(j.views, v)
	j.views = j.views[max(0, len(j.views)-keptViews):]
	return v.view, nil
}

type viewOf struct {
	snap layout.SnapshotKey
	view *treeView
}

// digestOf is the digest of what is selected of a snapshot.
func (j *job) digestOf(ctx context.Context, snap layout.SnapshotKey, all []selection) (string, error) {
	v, err := j.view(ctx, snap)
	if err != nil {
		return "", err
	}
	d, err := v.digest(all)
	if err != nil {
		return "", fmt.Errorf("failed to calculate checksum of ref %s: %w", snap, err)
	}
	return d, nil
}
