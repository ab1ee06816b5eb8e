package fsck

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"

	"varve.dev/errdefs"
	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

// dirs are the names that were listed, by directory.
type dirs map[string][]fs.DirEntry

// list reads every directory of the store but what is below the ones that
// stand for a layer, a container and so on.
func (c *checker) list() (dirs, error) {
	out := dirs{}
	names := []string{"."}
	for _, d := range layout.Dirs() {
		names = append(names, d.Path)
	}
	for _, name := range names {
		entries, err := c.readDir(name)
		switch {
		case reach.Missing(err):
			continue // R2, and what should be in it is missing
		case err != nil:
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
		}
		out[name] = entries
	}
	return out, nil
}

// fd is the store's directory.
func (c *checker) fd() int { return int(c.root.Fd()) }

// readDir lists a directory in order.
func (c *checker) readDir(rel string) ([]fs.DirEntry, error) {
	d, err := reach.Dir(c.fd(), rel)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	list, err := d.ReadDir(-1)
	slices.SortFunc(list, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return list, err
}

// isDir tells whether there is a directory; links are not followed.
func (c *checker) isDir(rel string) bool {
	fi, err := reach.Stat(c.fd(), rel)
	return err == nil && fi.IsDir()
}

func (c *checker) gone(rel string) bool {
	_, err := reach.Stat(c.fd(), rel)
	return errors.Is(err, fs.ErrNotExist)
}

// underWay are the paths that an intent, a sweep or, online, a lease accounts
// for.
func (c *checker) underWay() map[string]bool {
	out := map[string]bool{}
	for _, in := range c.rec.intents {
		for _, m := range in.Blobs {
			out[m.From], out[staged(m.From)], out[layout.BlobPath(m.Digest)] = true, true, true
		}
		for _, m := range in.Layers {
			out[m.From], out[staged(m.From)], out[layout.LayerPath(m.ID)] = true, true, true
		}
	}
	for _, s := range c.rec.sweeps {
		out[s.Path] = true
	}
	if c.online() {
		for e := range c.rec.edges {
			if temporary(e.Parent) {
				out[layout.NodePath(e.Child)] = true
			}
		}
	}
	delete(out, "") // of nodes without files
	return out
}

// staged returns the entry of staging/<boot> that a path is below, or "".
func staged(rel string) string {
	parts := strings.SplitN(rel, "/", 4)
	if len(parts) < 4 || parts[0] != layout.StagingDir {
		return ""
	}
	return path.Join(parts[:3]...)
}

// temporary tells whether a node stands for an operation under way.
func temporary(n layout.Node) bool {
	kind, _ := n.Split()
	return kind == layout.KindLease || kind == layout.KindIntent
}

// The temporaryPrefix begins files whose writer has not given them their name
// yet; what a crash leaves of them is removed at leisure. The marker file is
// written to force the file system's journal.
const (
	temporaryPrefix = ".tmp-"
	markerFile      = "barrier"
	lostAndFound    = "lost+found" // where the store is a whole file system
)

// rootNames: R1.
func (c *checker) rootNames(f found) {
	known := []string{layout.DatabaseFile, layout.LogFile, layout.SuspectFile, layout.DamagedFile, markerFile, lostAndFound}
	for _, d := range layout.Dirs() {
		if !strings.Contains(d.Path, "/") {
			known = append(known, d.Path)
		}
	}
	for _, e := range c.dirs["."] {
		if !slices.Contains(known, e.Name()) && !strings.HasPrefix(e.Name(), temporaryPrefix) {
			f("store", e.Name(), "the format has no such name")
		}
	}
}

// formatStands: R2. Of what is below a directory that is not there nothing is
// said.
func (c *checker) formatStands(f found) {
	bad := map[string]bool{}
	for _, d := range layout.Dirs() {
		if bad[path.Dir(d.Path)] {
			bad[d.Path] = true
			continue
		}
		fi, err := reach.Stat(c.fd(), d.Path)
		switch {
		case err != nil:
			f("store", d.Path, "it is missing: %v", err)
			bad[d.Path] = true
		case !fi.IsDir():
			f("store", d.Path, "it is no directory but %v", fi.Mode().Type())
			bad[d.Path] = true
		default:
			c.attributes(f, d.Path, fi, fs.FileMode(d.Perm))
		}
	}
	for _, name := range []string{layout.DatabaseFile, layout.LogFile} {
		fi, err := reach.Stat(c.fd(), name)
		switch {
		case err != nil: // M2, M4
		case fi.Mode().IsRegular():
			c.attributes(f, name, fi, 0o600)
		case name == layout.DatabaseFile && c.online(): // closed: M2
			f("store", name, "it is no regular file but %v", fi.Mode().Type())
		}
	}
}

func (c *checker) attributes(f found, rel string, fi fs.FileInfo, want fs.FileMode) {
	if got := permissions(fi); got != want {
		f("store", rel, "mode %v, must be %v", got, want)
	}
	if uid := owner(fi); uid != 0 {
		f("store", rel, "it belongs to user %d", uid)
	}
}

// permissions are the bits that chmod sets.
func permissions(fi fs.FileInfo) fs.FileMode {
	return fi.Mode() & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)
}

func owner(fi fs.FileInfo) uint32 { return fi.Sys().(*syscall.Stat_t).Uid }

// unnamed reports the entries of a directory that neither a record nor an
// operation under way names.
func (c *checker) unnamed(f found, dir string, recorded func(name string) bool) {
	under := c.underWay()
	for _, e := range c.dirs[dir] {
		rel := path.Join(dir, e.Name())
		if !recorded(e.Name()) && !under[rel] {
			f("entry "+printable(e.Name()), rel, "nothing names it")
		}
	}
}

// strangers reports what a directory holds beside the names that it may.
func (c *checker) strangers(f found, rel string, may ...string) {
	list, err := c.readDir(rel)
	if err != nil {
		return // that it is missing is another invariant's
	}
	for _, e := range list {
		if !slices.Contains(may, e.Name()) {
			f("entry "+printable(e.Name()), path.Join(rel, e.Name()), "it has no place beside %s", strings.Join(may, " and "))
		}
	}
}
