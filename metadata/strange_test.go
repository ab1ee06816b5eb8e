package metadata

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"varve.dev/layout"
)

// Something else in the place of the database or its log is set aside, and
// neither waited for nor followed.
func TestNoRegularFiles(t *testing.T) {
	for what, make := range map[string]func(at string) error{
		"fifo":      func(at string) error { return unix.Mkfifo(at, 0o600) },
		"directory": func(at string) error { return os.MkdirAll(filepath.Join(at, "x"), 0o700) },
		"link":      func(at string) error { return os.Symlink("/etc/passwd", at) },
	} {
		for _, name := range []string{layout.DatabaseFile, layout.LogFile} {
			t.Run(what+" for "+name, func(t *testing.T) {
				root := openRoot(t, t.TempDir())
				for _, d := range layout.Dirs() {
					must(t, root.Mkdir(d.Path, os.FileMode(d.Perm)))
				}
				db, err := Open(root, Options{})
				must(t, err)
				must(t, errors.Join(db.Close(), os.Remove(root.Path(name)), make(root.Path(name))))
				db, err = Open(root, Options{Rebuild: true})
				must(t, err)
				must(t, db.Close())
				for _, file := range []string{layout.DatabaseFile, layout.LogFile} {
					if fi, err := os.Lstat(root.Path(file)); err != nil || !fi.Mode().IsRegular() {
						t.Errorf("%s: %v, %v", file, fi, err)
					}
				}
			})
		}
	}
}
