package foreign

import (
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"varve.dev/fsck/reach"
)

// stack is the layers below another, as overlayfs shows them: the topmost
// first. They are folders.
type stack []string

// has tells whether something has the name.
func (s stack) has(name string) bool {
	dir, base := path.Split(name)
	shown := false
	s.each(dir, func(d *os.File) bool {
		var st unix.Stat_t
		if unix.Fstatat(int(d.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
			return true
		}
		shown = !isWhiteout(&st)
		return false
	})
	return shown
}

// names lists the directory, in order.
func (s stack) names(dir string) []string {
	hidden := map[string]bool{}
	var out []string
	s.each(dir, func(d *os.File) bool {
		entries, err := d.ReadDir(-1)
		for _, e := range entries {
			if hidden[e.Name()] {
				continue
			}
			hidden[e.Name()] = true
			var st unix.Stat_t
			if e.Type()&fs.ModeCharDevice == 0 || unix.Fstatat(int(d.Fd()), e.Name(), &st, unix.AT_SYMLINK_NOFOLLOW) == nil && !isWhiteout(&st) {
				out = append(out, e.Name())
			}
		}
		return err == nil
	})
	slices.Sort(out)
	return out
}

// each calls fn with every layer's part of a directory until it has enough, or
// something hides the rest.
func (s stack) each(dir string, fn func(*os.File) bool) {
	for _, tree := range s {
		d, deeper := descend(tree, dir)
		if d != nil {
			deeper = fn(d) && deeper
			d.Close()
		}
		if !deeper {
			return
		}
	}
}

// descend opens a directory of one layer, or nothing, and tells whether what
// the layers below have there shows.
func descend(tree, dir string) (d *os.File, deeper bool) {
	d, err := reach.Dir(unix.AT_FDCWD, tree)
	if err != nil {
		return nil, true
	}
	deeper = !isOpaque(d)
	for base := range strings.FieldsFuncSeq(dir, func(r rune) bool { return r == '/' }) {
		sub, err := reach.Dir(int(d.Fd()), base)
		if err != nil {
			var st unix.Stat_t
			gone := unix.Fstatat(int(d.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW) != nil
			d.Close()
			return nil, deeper && gone // a file, or a whiteout, hides it
		}
		d.Close()
		d = sub
		deeper = deeper && !isOpaque(d)
	}
	return d, deeper
}

// What overlayfs notes: trusted where a whole machine mounts it, user inside a
// user namespace.
var (
	opaqueXattrs   = []string{"trusted.overlay.opaque", "user.overlay.opaque"}
	redirectXattrs = []string{"trusted.overlay.redirect", "user.overlay.redirect"}
	metacopyXattrs = []string{"trusted.overlay.metacopy", "user.overlay.metacopy"}
)

// mark reads one of overlayfs's notes on a directory; empty: it has none.
func mark(d *os.File, names []string) string {
	value := make([]byte, 4096)
	for _, x := range names {
		if n, err := unix.Fgetxattr(int(d.Fd()), x, value); err == nil {
			return string(value[:n])
		}
	}
	return ""
}

// isOpaque tells whether a directory hides what is below: that it does not is
// noted too, sometimes.
func isOpaque(d *os.File) bool { return mark(d, opaqueXattrs) == "y" }

func isWhiteout(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 }

// countEmpty counts the regular files below an open directory, and those of
// them that have no bytes.
func countEmpty(d *os.File) (files, empty int) {
	for {
		entries, err := d.ReadDir(1000)
		for _, e := range entries {
			if e.IsDir() {
				if sub, err := reach.Dir(int(d.Fd()), e.Name()); err == nil {
					f, n := countEmpty(sub)
					files, empty = files+f, empty+n
					sub.Close()
				}
			}
			var st unix.Stat_t
			if e.Type().IsRegular() && unix.Fstatat(int(d.Fd()), e.Name(), &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
				files++
				if st.Size == 0 {
					empty++
				}
			}
		}
		if err != nil {
			return files, empty
		}
	}
}
