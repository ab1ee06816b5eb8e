package fsck

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// dirs are the names that were listed, by directory.
type dirs map[string][]os.DirEntry

// list reads every directory of the store but what is below the ones that
// stand for a layer, a container and so on.
func (c *checker) list() (dirs, error) {
	out := dirs{}
	names := []string{"."}
	for _, d := range layout.Dirs() {
		names = append(names, d.Path)
	}
	for _, name := range names {
		entries, err := os.ReadDir(c.path(name))
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
			continue // what should be in it is missing, and found to be
		case err != nil:
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
		}
		out[name] = entries
	}
	return out, nil
}

// isDir tells whether there is a directory; links are not followed.
func (c *checker) isDir(rel string) bool {
	fi, err := os.Lstat(c.path(rel))
	return err == nil && fi.IsDir()
}

func (c *checker) gone(rel string) bool {
	_, err := os.Lstat(c.path(rel))
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
				out[nodePath(e.Child)] = true
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

// nodePath is where the files of a node stand, or "".
func nodePath(n layout.Node) string {
	switch kind, id := n.Split(); kind {
	case layout.KindBlob:
		if blobKey(id) == nil {
			return layout.BlobPath(layout.BlobDigest(id))
		}
	case layout.KindLayer:
		return layout.LayerPath(layout.LayerID(id))
	case layout.KindActive:
		return layout.ActivePath(layout.LayerID(id))
	case layout.KindContainer:
		return layout.ContainerPath(layout.ContainerID(id))
	}
	return ""
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
