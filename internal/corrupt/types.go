package corrupt

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// What kind of thing has a name.
var typeKinds = []Kind{
	{"link target", "a symbolic link leads elsewhere", each("symbolic link", func(e entry) bool { return e.link() && e.st.Nlink == 1 }, func(s *store, e entry) error {
		target, err := os.Readlink(e.at)
		if err != nil {
			return err
		}
		s.did("layer %s: %q leads to %q", e.layer, e.name, target+s.hex(1))
		return s.instead(e, func() error { return errors.Join(os.Symlink(target+"x", e.at), like(e.at, e.st)) })
	})},
	{"whiteout to file", "a file stands where a whiteout has to hide one", each("whiteout", entry.whiteout, func(s *store, e entry) error {
		s.did("layer %s: %q is a file, no whiteout", e.layer, e.name)
		return s.instead(e, func() error { return os.WriteFile(e.at, nil, 0o644) })
	})},
	{"file to whiteout", "a whiteout hides what a file has to show", each("file", onlyName, func(s *store, e entry) error {
		s.did("layer %s: %q is a whiteout", e.layer, e.name)
		return s.instead(e, func() error { return unix.Mknod(e.at, unix.S_IFCHR, 0) })
	})},
	{"device number", "a device, or a whiteout, has another number", each("device", func(e entry) bool { return e.is(unix.S_IFCHR) || e.is(unix.S_IFBLK) }, func(s *store, e entry) error {
		s.did("layer %s: %q has another device number", e.layer, e.name)
		return s.instead(e, func() error { return errors.Join(unix.Mknod(e.at, e.st.Mode, int(e.st.Rdev)+1), like(e.at, e.st)) })
	})},
	{"file to link", "a symbolic link stands where a file was, to a copy of it", each("file", onlyName, func(s *store, e entry) error {
		aside, err := s.aside()
		if err != nil {
			return err
		}
		to := filepath.Join(aside, "copy")
		s.did("layer %s: %q is a link to a copy outside of the store", e.layer, e.name)
		return s.instead(e, func() error { return os.Symlink(to, e.at) }, to)
	})},
	{"link to file", "a file stands where a symbolic link was", each("symbolic link", func(e entry) bool { return e.link() && e.st.Nlink == 1 }, func(s *store, e entry) error {
		s.did("layer %s: %q is a file, no link", e.layer, e.name)
		return s.instead(e, func() error { return errors.Join(os.WriteFile(e.at, []byte("x"), 0o644), like(e.at, e.st)) })
	})},
	{"file to directory", "a directory stands where a file was", each("file", onlyName, func(s *store, e entry) error {
		s.did("layer %s: %q is a directory", e.layer, e.name)
		s.may(Finding{Invariant: "L4", Object: layerObject(e.layer), Path: filepath.Join(e.name, "inside")})
		return s.instead(e, func() error {
			return errors.Join(os.Mkdir(e.at, 0o755), os.WriteFile(filepath.Join(e.at, "inside"), nil, 0o644))
		})
	})},
	{"file to fifo", "a fifo stands where a file was", each("file", onlyName, func(s *store, e entry) error {
		s.did("layer %s: %q is a fifo", e.layer, e.name)
		return s.instead(e, func() error { return errors.Join(unix.Mkfifo(e.at, 0o644), like(e.at, e.st)) })
	})},
	{"file to socket", "a socket stands where a file was", each("file", onlyName, func(s *store, e entry) error {
		s.did("layer %s: %q is a socket", e.layer, e.name)
		return s.instead(e, func() error { return unix.Mknod(e.at, unix.S_IFSOCK|0o644, 0) })
	})},
	{"directory to file", "a file stands where a directory was", each("directory below a root", below0, func(s *store, e entry) error {
		s.did("layer %s: %q is a file", e.layer, e.name)
		return s.insteadOfDirectory(e, func() error { return errors.Join(os.RemoveAll(e.at), os.WriteFile(e.at, nil, 0o644)) })
	})},
	{"directory to link", "a symbolic link leads to where the directory has gone", each("directory below a root", below0, func(s *store, e entry) error {
		aside, err := s.aside()
		if err != nil {
			return err
		}
		to := filepath.Join(aside, "moved")
		s.did("layer %s: %q moved out of the store, a link to it in its place", e.layer, e.name)
		return s.insteadOfDirectory(e, func() error { return errors.Join(os.Rename(e.at, to), os.Symlink(to, e.at)) })
	})},
}

func onlyName(e entry) bool { return e.regular() && e.st.Nlink == 1 }

// instead puts something else in the place of a file, which goes to the places
// given.
func (s *store) instead(e entry, make func() error, to ...string) error {
	s.wrong(e.layer, e.name)
	s.sharing(e)
	return s.beside(e, func() error {
		if len(to) > 0 {
			return errors.Join(os.Rename(e.at, to[0]), make())
		}
		return errors.Join(os.Remove(e.at), make())
	})
}

func (s *store) insteadOfDirectory(e entry, do func() error) error {
	if err := s.missing(e, true); err != nil {
		return err
	}
	return s.beside(e, do)
}
