package fsck

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// dirs are the names that were listed, by directory.
type dirs map[string][]os.DirEntry

// list reads every directory of the store but those below layers and active.
func (c *check) list() (dirs, error) {
	out := dirs{}
	names := []string{"."}
	for _, d := range layout.Dirs() {
		names = append(names, d.Path)
	}
	for _, name := range names {
		entries, err := os.ReadDir(c.path(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // an empty one would hold the same
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
		}
		out[name] = entries
	}
	return out, nil
}

// fileChecks compare records with names on disk, both ways.
func (c *check) fileChecks() {
	c.checkRootNames()
	c.checkBlobs()
	c.checkLayers()
	c.checkActive()
	c.checkContainers()
	c.checkTrash()
	c.checkStaging()
	c.checkIngests()
}

// temporaryPrefix begins files that are being written, whose writer has not
// given them their name; what a crash leaves of them is removed at leisure.
const temporaryPrefix = ".tmp-"

// checkRootNames: R1.
func (c *check) checkRootNames() {
	known := []string{layout.DatabaseFile, "barrier"} // the latter is package durable's marker
	for _, d := range layout.Dirs() {
		known = append(known, strings.Split(d.Path, "/")[0])
	}
	for _, e := range c.dirs["."] {
		if !slices.Contains(known, e.Name()) && !strings.HasPrefix(e.Name(), temporaryPrefix) {
			c.found("R1", "store", e.Name(), "the format has no such name")
		}
	}
}

// inFlight are the paths that an intent or a sweep accounts for.
func (c *check) inFlight() map[string]bool {
	out := map[string]bool{}
	for _, in := range c.rec.intents {
		for _, m := range in.Blobs {
			out[m.From], out[layout.BlobPath(m.Digest)] = true, true
		}
		for _, m := range in.Layers {
			out[m.From], out[layout.LayerPath(m.ID)] = true, true
		}
	}
	for _, s := range c.rec.sweeps {
		out[s.Path] = true
	}
	return out
}

// checkBlobs: B1, B2, B4, B5.
func (c *check) checkBlobs() {
	under := c.inFlight()
	for d, rec := range c.rec.blobs {
		c.report.Blobs++
		object, rel := "blob "+string(d), layout.BlobPath(d)
		fi, err := os.Lstat(c.path(rel))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			c.found("B1", object, rel, "the file is missing")
		case err != nil:
			c.found("B1", object, rel, "%v", err)
		case !fi.Mode().IsRegular():
			c.found("B1", object, rel, "it is no regular file but %v", fi.Mode().Type())
		case fi.Size() != rec.Size:
			c.found("B2", object, rel, "%d bytes, recorded are %d", fi.Size(), rec.Size)
		case c.opts.Level != layout.Quick && fi.Mode().Perm() != 0o444:
			c.found("B5", object, rel, "mode %04o", fi.Mode().Perm())
		}
	}
	for dir, entries := range c.dirs {
		if dir == layout.BlobsDir || !strings.HasPrefix(dir, layout.BlobsDir+"/") {
			continue
		}
		for _, e := range entries {
			rel := path.Join(dir, e.Name())
			if isShard(rel) {
				continue
			}
			d := layout.BlobDigest(string(layout.Algorithm) + ":" + e.Name())
			if _, ok := c.rec.blobs[d]; ok && layout.BlobPath(d) == rel || under[rel] {
				continue
			}
			c.found("B4", "file "+e.Name(), rel, "nothing names it")
		}
	}
}

func isShard(rel string) bool {
	return slices.ContainsFunc(layout.Dirs(), func(d layout.Dir) bool { return d.Path == rel })
}

// checkLayers: L1, L2.
func (c *check) checkLayers() {
	under := c.inFlight()
	for id := range c.rec.layers {
		c.report.Layers++
		rel := path.Join(layout.LayerPath(id), layout.TreeDir)
		if fi, err := os.Lstat(c.path(rel)); err != nil || !fi.IsDir() {
			c.found("L1", "layer "+string(id), rel, "the directory is missing")
		}
	}
	for _, e := range c.dirs[layout.LayersDir] {
		id := layout.LayerID(e.Name())
		if _, ok := c.rec.layers[id]; !ok && !under[layout.LayerPath(id)] {
			c.found("L2", "directory "+e.Name(), layout.LayerPath(id), "nothing names it")
		}
	}
}

// checkActive: S3, S4.
func (c *check) checkActive() {
	under := c.inFlight()
	named := map[string]bool{}
	for key, rec := range c.rec.snapshots {
		if rec.Kind == layout.SnapshotCommitted || rec.Layer == "" {
			continue
		}
		named[string(rec.Layer)] = true
		rel := layout.ActivePath(rec.Layer)
		if under[rel] {
			continue // on its way to become a layer
		}
		// overlay's work directory is scratch: a commit that did not come
		// to pass took it away, the next mount makes it again.
		if fi, err := os.Lstat(c.path(path.Join(rel, layout.TreeDir))); err != nil || !fi.IsDir() {
			c.found("S3", fmt.Sprintf("snapshot %q", key), rel, "its directory %s is missing", layout.TreeDir)
		}
	}
	for _, e := range c.dirs[layout.ActiveDir] {
		rel := path.Join(layout.ActiveDir, e.Name())
		if !named[e.Name()] && !under[rel] {
			c.found("S4", "directory "+e.Name(), rel, "nothing names it")
		}
	}
}

// checkContainers: C1, C2.
func (c *check) checkContainers() {
	under := c.inFlight()
	for id, rec := range c.rec.containers {
		object, rel := "container "+string(id), layout.ContainerPath(id)
		if fi, err := os.Lstat(c.path(rel)); err != nil || !fi.IsDir() {
			c.found("C1", object, rel, "its directory is missing")
		}
		if _, ok := c.rec.snapshots[rec.Snapshot]; !ok {
			c.found("C1", object, "", "its snapshot %q is not recorded", rec.Snapshot)
		}
	}
	for _, e := range c.dirs[layout.ContainersDir] {
		id := layout.ContainerID(e.Name())
		if _, ok := c.rec.containers[id]; !ok && !under[layout.ContainerPath(id)] {
			c.found("C2", "directory "+e.Name(), layout.ContainerPath(id), "nothing names it")
		}
	}
}

// checkTrash: T1. A closed store's trash is emptied when it is opened.
func (c *check) checkTrash() {
	if c.opts.DB == nil {
		return
	}
	for _, e := range c.dirs[layout.TrashDir] {
		if _, ok := c.rec.sweeps[e.Name()]; !ok {
			c.found("T1", "trash "+e.Name(), layout.TrashPath(e.Name()), "no sweep names it")
		}
	}
}

// checkSweeps: T2.
func (c *check) checkSweeps() {
	for id, s := range c.rec.sweeps {
		object := "sweep " + id
		if !filepath.IsLocal(s.Path) {
			c.found("T2", object, s.Path, "the path leaves the store")
			continue
		}
		kind, name := s.Node.Split()
		_, isBlob := c.rec.blobs[layout.BlobDigest(name)]
		_, isLayer := c.rec.layers[layout.LayerID(name)]
		// An unclaimed sweep of a blob that came back is dropped by the
		// sweeper, not by whoever brought the blob.
		if kind == layout.KindBlob && isBlob && s.Claimed || kind == layout.KindLayer && isLayer {
			c.found("T2", object, s.Path, "a record names what it is to delete")
		}
	}
}

// checkStaging: G1, G2.
func (c *check) checkStaging() {
	for _, boot := range c.dirs[layout.StagingDir] {
		rel := path.Join(layout.StagingDir, boot.Name())
		trees, err := os.ReadDir(c.path(rel))
		if err != nil {
			continue // gone meanwhile
		}
		if c.opts.DB == nil && len(c.rec.intents) == 0 || c.opts.DB != nil && boot.Name() != c.opts.Boot {
			c.found("G1", "directory "+boot.Name(), rel, "it holds %d trees", len(trees))
		}
		for _, t := range trees {
			id := layout.LayerID(t.Name())
			if _, ok := c.rec.layers[id]; !ok {
				continue
			}
			if _, err := os.Lstat(c.path(layout.LayerPath(id))); errors.Is(err, fs.ErrNotExist) {
				c.found("G2", "layer "+string(id), path.Join(rel, t.Name()), "it is recorded and stands only here")
			}
		}
	}
}

// checkIngests: N1. An ingest that is being made has not everything yet.
func (c *check) checkIngests() {
	for _, e := range c.dirs[layout.IngestDir] {
		rel := layout.IngestPath(layout.IngestID(e.Name()))
		entries, err := os.ReadDir(c.path(rel))
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				c.found("N1", "ingest "+e.Name(), rel, "%v", err)
			}
			continue
		}
		for _, f := range entries {
			if f.Name() != layout.IngestData && f.Name() != layout.IngestInfo {
				c.found("N1", "ingest "+e.Name(), path.Join(rel, f.Name()), "an ingest has no such file")
			}
		}
		data, err := os.ReadFile(c.path(path.Join(rel, layout.IngestInfo)))
		if errors.Is(err, fs.ErrNotExist) {
			continue // T-N1: the next writer takes it over
		}
		var rec layout.IngestRecord
		if err == nil {
			err = json.Unmarshal(data, &rec)
		}
		if err != nil {
			c.found("N1", "ingest "+e.Name(), path.Join(rel, layout.IngestInfo), "%v", err)
		}
	}
}
