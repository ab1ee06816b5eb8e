package corrupt

import (
	"bytes"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// What files hold.
var contentKinds = []Kind{
	{"truncate", "a file of a layer is cut short", each("file with contents", entry.full, func(s *store, e entry) error {
		size := s.Int64N(e.st.Size)
		s.did("layer %s: %q cut to %d of %d bytes", e.layer, e.name, size, e.st.Size)
		return s.inside(e, func(f *os.File) error { return f.Truncate(size) })
	})},
	{"bit flip", "one bit of a file of a layer is the other one", each("file with contents", entry.full, func(s *store, e entry) error {
		at, bit := s.Int64N(e.st.Size), s.IntN(8)
		s.did("layer %s: %q, bit %d of byte %d flipped", e.layer, e.name, bit, at)
		return s.inside(e, func(f *os.File) error { return flip(f, at, bit) })
	})},
	{"extended", "a file has something after its end", each("file", entry.regular, func(s *store, e entry) error {
		s.did("layer %s: %q has one byte more", e.layer, e.name)
		return s.inside(e, func(f *os.File) error {
			_, err := f.WriteAt([]byte{byte(s.IntN(2))}, e.st.Size)
			return err
		})
	})},
	{"zeros", "a file of the right length has nothing but NUL in it", each("file with contents", notZero, func(s *store, e entry) error {
		s.did("layer %s: %q filled with NUL", e.layer, e.name)
		return s.inside(e, func(f *os.File) error {
			_, err := f.WriteAt(make([]byte, e.st.Size), 0)
			return err
		})
	})},
	{"cut and extended", "a file lost its end and got its length back", each("file with contents", notZero, func(s *store, e entry) error {
		s.did("layer %s: %q cut to nothing and extended again", e.layer, e.name)
		return s.inside(e, func(f *os.File) error { return errors.Join(f.Truncate(0), f.Truncate(e.st.Size)) })
	})},
	{"hole", "a page of a file is a hole", each("file of a page", notZeroPage, func(s *store, e entry) error {
		s.did("layer %s: %q has a hole at its beginning", e.layer, e.name)
		return s.inside(e, func(f *os.File) error {
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, page)
		})
	})},
	{"replaced", "another file of the same length, owner, mode and time stands there", each("file with contents", func(e entry) bool { return e.full() && onlyName(e) }, replaced)},
	{"swapped files", "two files have each other's contents", swapped},
}

const page = 4096

// flip changes one bit.
func flip(f *os.File, at int64, bit int) error {
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		return err
	}
	b[0] ^= 1 << bit
	_, err := f.WriteAt(b, at)
	return err
}

func notZero(e entry) bool { return e.full() && hasBytes(e.at, e.st.Size) }

func notZeroPage(e entry) bool { return e.full() && e.st.Size >= page && hasBytes(e.at, page) }

// hasBytes tells whether anything but NUL is at the beginning of a file.
func hasBytes(at string, n int64) bool {
	f, err := os.Open(at)
	if err != nil {
		return false
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, n))
	return err == nil && len(bytes.Trim(data, "\x00")) > 0
}

func replaced(s *store, e entry) error {
	s.did("layer %s: %q replaced by another file", e.layer, e.name)
	return s.instead(e, func() error {
		return errors.Join(os.WriteFile(e.at, s.bytes(e.st.Size), 0o600), like(e.at, e.st))
	})
}

func swapped(s *store) error {
	a, b, err := s.pair("file with contents", func(a, b entry) bool { return a.full() && b.full() && a.st.Size != b.st.Size })
	if err != nil {
		return err
	}
	s.did("layer %s: %q and %q swapped", a.layer, a.name, b.name)
	s.wrong(a.layer, a.first)
	s.wrong(a.layer, b.first)
	return s.in(a.layer, []string{a.name, b.name}, func() error {
		one, err := os.ReadFile(a.at)
		if err != nil {
			return err
		}
		two, err := os.ReadFile(b.at)
		if err != nil {
			return err
		}
		return errors.Join(fill(a.at, two), fill(b.at, one))
	})
}

// fill gives an existing file other contents.
func fill(at string, data []byte) error {
	return rewrite(at, func(f *os.File) error {
		_, err := f.WriteAt(data, 0)
		return errors.Join(err, f.Truncate(int64(len(data))))
	})
}
