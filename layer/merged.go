package layer

import (
	"maps"
	"path"
	"slices"

	"golang.org/x/sys/unix"
)

// Merged is what overlayfs shows of layers, the topmost first, by name, but
// for the root directory itself. The entries are the layers' own.
func Merged(layers []Parent) map[string]*Entry {
	view := map[string]*Entry{}
	hidden := map[string]bool{} // names below which lower layers do not show
	for _, l := range layers {
		var hides []string
		for i := range l.Manifest.Entries {
			e := &l.Manifest.Entries[i]
			for _, n := range e.Names {
				if n == "." || isHidden(hidden, view, n) {
					continue
				}
				if e.IsWhiteout() {
					hides = append(hides, n)
					continue
				}
				if e.IsOpaque() || e.Mode&unix.S_IFMT != unix.S_IFDIR {
					hides = append(hides, n)
				}
				if view[n] == nil {
					view[n] = e
				}
			}
		}
		for _, n := range hides {
			hidden[n] = true
		}
		if l.Manifest.hidesAll() {
			break
		}
	}
	return view
}

// hidesAll tells whether nothing of lower layers shows.
func (m *Manifest) hidesAll() bool {
	root, ok := m.Lookup(".")
	return ok && root.IsOpaque()
}

// isHidden tells whether a higher layer hides the name: by a whiteout of it
// (hidden, and not in view), or by what it has at a directory above.
func isHidden(hidden map[string]bool, view map[string]*Entry, name string) bool {
	if hidden[name] && view[name] == nil {
		return true
	}
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if hidden[dir] {
			return true
		}
	}
	return false
}

// Difference is the layer that makes upper of lower: what upper shows and
// lower does not show the same, the directories that it is in, and whiteouts
// of what upper does not show. A directory's time alone makes no difference.
func Difference(lower, upper []Parent) *Manifest {
	was, is := Merged(lower), Merged(upper)
	wasNames, isNames := visibleNames(was), visibleNames(is)
	out := map[string]*Entry{} // by first name
	add := func(name string) {
		e := is[name]
		names := isNames[e]
		if out[names[0]] != nil {
			return
		}
		c := *e
		c.Names = names
		c.Xattrs = maps.Clone(e.Xattrs)
		delete(c.Xattrs, opaqueXattr) // about the layer that it was in
		out[names[0]] = &c
	}
	around := func(name string) {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			add(dir)
		}
	}
	for name, e := range is {
		old := was[name]
		if old != nil && same(old, e) && slices.Equal(wasNames[old], isNames[e]) {
			continue
		}
		add(name)
		for _, n := range isNames[e] {
			around(n)
		}
	}
	for name := range was {
		if is[name] != nil {
			continue
		}
		if up := path.Dir(name); up != "." && (is[up] == nil || is[up].Mode&unix.S_IFMT != unix.S_IFDIR) {
			continue // gone with its directory
		}
		out[name] = &Entry{Names: []string{name}, Mode: unix.S_IFCHR}
		around(name)
	}
	m := &Manifest{}
	for _, name := range slices.Sorted(maps.Keys(out)) {
		m.Entries = append(m.Entries, *out[name])
	}
	return m
}

// visibleNames are the names in view of each entry, in order.
func visibleNames(view map[string]*Entry) map[*Entry][]string {
	out := map[*Entry][]string{}
	for name, e := range view {
		out[e] = append(out[e], name)
	}
	for _, names := range out {
		slices.Sort(names)
	}
	return out
}

// same tells whether two entries are alike but for their names.
func same(a, b *Entry) bool {
	isDir := a.Mode&unix.S_IFMT == unix.S_IFDIR
	return a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID && a.Size == b.Size && a.Rdev == b.Rdev &&
		a.SHA256 == b.SHA256 && a.Target == b.Target && (isDir || a.MTime == b.MTime) &&
		maps.Equal(withoutOpaque(a.Xattrs), withoutOpaque(b.Xattrs))
}

func withoutOpaque(xattrs map[string]string) map[string]string {
	if _, ok := xattrs[opaqueXattr]; !ok {
		return xattrs
	}
	out := maps.Clone(xattrs)
	delete(out, opaqueXattr)
	return out
}
