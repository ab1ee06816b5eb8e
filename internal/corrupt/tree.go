package corrupt

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// entry is a name in the tree of a layer.
type entry struct {
	layer string
	name  string // in the tree; "." is the tree itself
	first string // of the names of the same file
	at    string // on disk
	st    unix.Stat_t
}

func (e entry) is(kind uint32) bool { return e.st.Mode&unix.S_IFMT == kind }
func (e entry) regular() bool       { return e.is(unix.S_IFREG) }
func (e entry) directory() bool     { return e.is(unix.S_IFDIR) }
func (e entry) link() bool          { return e.is(unix.S_IFLNK) }
func (e entry) whiteout() bool      { return e.is(unix.S_IFCHR) && e.st.Rdev == 0 }
func (e entry) root() bool          { return e.name == "." }
func (e entry) full() bool          { return e.regular() && e.st.Size > 0 }

func (s *store) treePath(layer string) string { return s.path("layers", layer, "fs") }

// entries returns every name in every layer, in order.
func (s *store) entries() (all []entry, err error) {
	layers, err := s.layers()
	for _, layer := range layers {
		var in []entry
		tree := s.treePath(layer)
		err = errors.Join(err, filepath.WalkDir(tree, func(at string, _ fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			name, err := filepath.Rel(tree, at)
			if err != nil {
				return err
			}
			e := entry{layer: layer, name: name, first: name, at: at}
			if err := unix.Lstat(at, &e.st); err != nil {
				return err
			}
			in = append(in, e)
			return nil
		}))
		// The first of several names is the smallest.
		slices.SortFunc(in, func(a, b entry) int { return cmp.Compare(a.name, b.name) })
		first := map[uint64]string{}
		for i := range in {
			if in[i].directory() || in[i].st.Nlink < 2 {
				continue
			}
			if name, ok := first[in[i].st.Ino]; ok {
				in[i].first = name
			} else {
				first[in[i].st.Ino] = in[i].name
			}
		}
		all = append(all, in...)
	}
	return all, err
}

// entry chooses one of the names for which ok holds.
func (s *store) entry(what string, ok func(entry) bool) (entry, error) {
	all, err := s.entries()
	if err != nil {
		return entry{}, err
	}
	return pickOne(s, what, slices.DeleteFunc(all, func(e entry) bool { return !ok(e) }))
}

// pair chooses two different files of one layer for which ok holds.
func (s *store) pair(what string, ok func(a, b entry) bool) (a, b entry, err error) {
	all, err := s.entries()
	if err != nil {
		return a, b, err
	}
	for len(all) > 0 {
		i := s.IntN(len(all))
		a = all[i]
		b, err = pickOne(s, "two of a "+what, slices.DeleteFunc(slices.Clone(all), func(b entry) bool {
			return b.layer != a.layer || b.first == a.first || !ok(a, b)
		}))
		if err == nil {
			return a, b, nil
		}
		all = slices.Delete(all, i, i+1)
	}
	return a, b, err
}

// each adapts a function that damages one entry.
func each(what string, ok func(entry) bool, do func(*store, entry) error) func(*store) error {
	return func(s *store) error {
		e, err := s.entry(what, ok)
		if err != nil {
			return err
		}
		return do(s, e)
	}
}

// wrong notes that a name differs from what its layer has to hold.
func (s *store) wrong(layer, name string) { s.must("L4", layerObject(layer), name) }

// in changes the tree of a layer. What the change does to the times of these
// names is put back for every other seed; for the rest it is wrong as well.
func (s *store) in(layer string, names []string, change func() error) error {
	times := map[string]unix.Stat_t{}
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(s.treePath(layer), name), &st); err != nil {
			return err
		}
		times[name] = st
	}
	err := change()
	quiet := s.coin()
	for name, st := range times {
		if !quiet {
			s.may(Finding{Invariant: "L4", Object: layerObject(layer), Path: name})
			continue
		}
		if terr := setTimes(filepath.Join(s.treePath(layer), name), st); !errors.Is(terr, unix.ENOENT) {
			err = errors.Join(err, terr)
		}
	}
	return err
}

func setTimes(at string, st unix.Stat_t) error {
	return unix.UtimesNanoAt(unix.AT_FDCWD, at, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

// inside changes what a file holds.
func (s *store) inside(e entry, change func(f *os.File) error) error {
	s.wrong(e.layer, e.first)
	return s.in(e.layer, []string{e.name}, func() error { return rewrite(e.at, change) })
}

// sharing notes that the other names of a file may be said to be none of it:
// of two that differ neither is the right one by itself. overlayfs makes all
// whiteouts of a directory names of one file.
func (s *store) sharing(e entry) {
	if e.st.Nlink > 1 {
		s.may(Finding{Invariant: "L4", Object: layerObject(e.layer), About: fmt.Sprintf("%q", e.first)})
	}
}

// rewrite opens a file for writing, whatever its mode.
func rewrite(at string, change func(f *os.File) error) error {
	f, err := os.OpenFile(at, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	return errors.Join(change(f), f.Close())
}

// beside changes the directory that an entry is in.
func (s *store) beside(e entry, change func() error) error {
	return s.in(e.layer, []string{path.Dir(e.name)}, change)
}

// below returns the names of a directory and of all in it.
func below(all []entry, dir entry) (out []entry) {
	for _, e := range all {
		if e.layer == dir.layer && (e.name == dir.name || dir.name == "." || strings.HasPrefix(e.name, dir.name+"/")) {
			out = append(out, e)
		}
	}
	return out
}

// like gives a new file the owner, mode and times of another.
func like(at string, st unix.Stat_t) error {
	err := unix.Lchown(at, int(st.Uid), int(st.Gid))
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		err = errors.Join(err, unix.Chmod(at, st.Mode&0o7777))
	}
	return errors.Join(err, setTimes(at, st))
}
