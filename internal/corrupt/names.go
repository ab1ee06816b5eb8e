package corrupt

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Which names there are.
var nameKinds = []Kind{
	{"delete", "a file of a layer is missing", each("file that is no directory", func(e entry) bool { return !e.directory() }, func(s *store, e entry) error {
		s.did("layer %s: %q deleted", e.layer, e.name)
		s.wrong(e.layer, e.name)
		return s.beside(e, func() error { return os.Remove(e.at) })
	})},
	{"extra file", "a layer has a file that is not its own", each("directory", entry.directory, extra)},
	{"missing directory", "a directory of a layer is missing, with all below it", each("directory below a root", below0, func(s *store, e entry) error {
		s.did("layer %s: %q removed, with all below it", e.layer, e.name)
		if err := s.missing(e, true); err != nil {
			return err
		}
		return s.beside(e, func() error { return os.RemoveAll(e.at) })
	})},
	{"emptied directory", "a directory has lost all that was in it", each("directory with something in it", filled, func(s *store, e entry) error {
		s.did("layer %s: %q emptied", e.layer, e.name)
		if err := s.missing(e, false); err != nil {
			return err
		}
		return s.in(e.layer, []string{e.name}, func() error { return empty(e.at) })
	})},
	{"renamed", "a file has another name", each("file below a root", func(e entry) bool { return !e.root() && !e.directory() }, func(s *store, e entry) error {
		to := e.name + "." + s.hex(4)
		s.did("layer %s: %q renamed to %q", e.layer, e.name, to)
		s.wrong(e.layer, e.name)
		s.wrong(e.layer, to)
		return s.beside(e, func() error { return os.Rename(e.at, filepath.Join(s.treePath(e.layer), to)) })
	})},
	{"upper case", "a name has other letters", each("name with small letters", hasLetters, func(s *store, e entry) error {
		to := path.Join(path.Dir(e.name), strings.ToUpper(path.Base(e.name)))
		s.did("layer %s: %q renamed to %q", e.layer, e.name, to)
		s.wrong(e.layer, e.name)
		s.wrong(e.layer, to)
		return s.beside(e, func() error { return os.Rename(e.at, filepath.Join(s.treePath(e.layer), to)) })
	})},
	{"swapped names", "two files have each other's names", swappedNames},
	{"hard link broken", "one name of a file is a copy of it", each("file with several names", shared, func(s *store, e entry) error {
		s.did("layer %s: %q is a copy, no hard link", e.layer, e.name)
		s.wrong(e.layer, e.name)
		s.sharing(e)
		return s.beside(e, func() error {
			data, err := os.ReadFile(e.at)
			return errors.Join(err, os.Remove(e.at), os.WriteFile(e.at, data, 0o600), like(e.at, e.st))
		})
	})},
	{"hard link made", "two files are one", joined},
}

func below0(e entry) bool { return e.directory() && !e.root() }

func filled(e entry) bool {
	list, err := os.ReadDir(e.at)
	return e.directory() && err == nil && len(list) > 0
}

func shared(e entry) bool { return e.regular() && e.st.Nlink > 1 }

func hasLetters(e entry) bool {
	base := path.Base(e.name)
	_, err := os.Lstat(filepath.Join(path.Dir(e.at), strings.ToUpper(base)))
	return !e.directory() && strings.ToUpper(base) != base && os.IsNotExist(err)
}

// extra makes something in a directory of a layer.
func extra(s *store, dir entry) error {
	base := []string{"stranger", ".hidden", "new\nline", "\xff\xfe", strings.Repeat("long", 60)}[s.IntN(5)] + s.hex(4)
	name := path.Join(dir.name, base)
	at := filepath.Join(dir.at, base)
	makes := []struct {
		what string
		do   func() error
	}{
		{"file", func() error { return os.WriteFile(at, []byte("stranger\n"), 0o644) }},
		{"empty file", func() error { return os.WriteFile(at, nil, 0o600) }},
		{"directory", func() error { return os.Mkdir(at, 0o755) }},
		{"link", func() error { return os.Symlink("/etc/passwd", at) }},
		{"fifo", func() error { return unix.Mkfifo(at, 0o600) }},
		{"whiteout", func() error { return unix.Mknod(at, unix.S_IFCHR, 0) }},
		{"device", func() error { return unix.Mknod(at, unix.S_IFBLK|0o600, int(unix.Mkdev(7, 0))) }},
	}
	m := makes[s.IntN(len(makes))]
	s.did("layer %s: a %s too many, %q", dir.layer, m.what, name)
	s.wrong(dir.layer, name)
	return s.in(dir.layer, []string{dir.name}, m.do)
}

// missing notes that everything below a directory is, and it itself perhaps.
func (s *store) missing(dir entry, itself bool) error {
	all, err := s.entries()
	if err != nil {
		return err
	}
	for _, e := range below(all, dir) {
		if itself || e.name != dir.name {
			s.wrong(e.layer, e.name)
		}
	}
	return nil
}

func empty(dir string) error {
	list, err := os.ReadDir(dir)
	for _, e := range list {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

func swappedNames(s *store) error {
	a, b, err := s.pair("file", func(a, b entry) bool {
		return a.regular() && b.regular() && a.st.Nlink == 1 && b.st.Nlink == 1 && (a.st.Size != b.st.Size || a.st.Mtim != b.st.Mtim || a.st.Mode != b.st.Mode)
	})
	if err != nil {
		return err
	}
	s.did("layer %s: %q and %q renamed to each other", a.layer, a.name, b.name)
	s.wrong(a.layer, a.name)
	s.wrong(a.layer, b.name)
	return s.in(a.layer, []string{path.Dir(a.name), path.Dir(b.name)}, func() error {
		return unix.Renameat2(unix.AT_FDCWD, a.at, unix.AT_FDCWD, b.at, unix.RENAME_EXCHANGE)
	})
}

// joined makes one of two files another name of the other.
func joined(s *store) error {
	a, b, err := s.pair("file", func(a, b entry) bool { return a.regular() && b.regular() && b.st.Nlink == 1 })
	if err != nil {
		return err
	}
	s.did("layer %s: %q is a hard link of %q", a.layer, b.name, a.name)
	// Which is the real one cannot be told: only that they are one.
	s.damage.OneOf = []Finding{
		{Invariant: "L4", Object: layerObject(a.layer), Path: b.name},
		{Invariant: "L4", Object: layerObject(a.layer), About: fmt.Sprintf("%q", b.name)},
	}
	return s.beside(b, func() error { return errors.Join(os.Remove(b.at), os.Link(a.at, b.at)) })
}
