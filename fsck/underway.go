package fsck

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"

	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

// intentOpen: J1.
func (c *checker) intentOpen(f found) {
	if c.online() {
		return
	}
	for id, in := range c.rec.intents {
		f("intent "+string(id), "", "%q is not finished", in.Purpose)
	}
}

// trashNamed: T1. A closed store's trash is emptied when it is opened.
func (c *checker) trashNamed(f found) {
	if !c.online() {
		return
	}
	c.unnamed(f, layout.TrashDir, func(name string) bool {
		_, ok := c.rec.sweeps[name]
		return ok || c.rec.unreadable[layout.BucketSweeps+"/"+name]
	})
}

// sweepPath: T2.
func (c *checker) sweepPath(f found) {
	recorded := map[string]string{} // path → what stands there
	for d := range c.rec.blobs {
		recorded[layout.BlobPath(d)] = blobObject(d)
	}
	for id := range c.rec.layers {
		recorded[layout.LayerPath(id)] = layerObject(id)
	}
	for id := range c.rec.containers {
		recorded[layout.ContainerPath(id)] = "container " + string(id)
	}
	for key, rec := range c.rec.snapshots {
		if writable(rec) {
			recorded[layout.ActivePath(rec.Layer)] = snapshotObject(key)
		}
	}
	for id, s := range c.rec.sweeps {
		if at := layout.NodePath(s.Node); at == "" || s.Path != at {
			f("sweep "+id, s.Path, "%q stands at %q", string(s.Node), at)
			continue
		}
		// A publication may take a blob back until the sweep is claimed;
		// the sweeper drops the sweep then.
		kind, _ := s.Node.Split()
		if object, ok := recorded[s.Path]; ok && (s.Claimed || kind != layout.KindBlob) {
			f("sweep "+id, s.Path, "%s is what it is to delete", object)
		}
	}
}

// stagingBoot: G1. A tree that is all there is of a recorded layer is G2's.
func (c *checker) stagingBoot(f found) {
	under, only := c.underWay(), c.onlyStaged()
	for _, boot := range c.dirs[layout.StagingDir] {
		if c.online() && boot.Name() == c.opts.Boot {
			continue
		}
		rel := path.Join(layout.StagingDir, boot.Name())
		entries, err := c.readDir(rel)
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone meanwhile
		}
		stray := 0
		for _, e := range entries {
			at := path.Join(rel, e.Name())
			if _, kept := only[at]; !kept && !under[at] {
				stray++
			}
		}
		if stray > 0 || len(entries) == 0 {
			f("entry "+printable(boot.Name()), rel, "of another boot, or of a store that is closed; %d trees that nothing names", stray)
		}
	}
}

// stagingLayer: G2.
func (c *checker) stagingLayer(f found) {
	for at, id := range c.onlyStaged() {
		f(layerObject(id), at, "it is recorded and stands only here")
	}
}

// onlyStaged returns the trees in staging that are missing where they are
// recorded to stand, by path.
func (c *checker) onlyStaged() map[string]layout.LayerID {
	out := map[string]layout.LayerID{}
	for _, boot := range c.dirs[layout.StagingDir] {
		rel := path.Join(layout.StagingDir, boot.Name())
		trees, err := c.readDir(rel)
		if err != nil {
			continue // gone meanwhile, or G1's
		}
		for _, t := range trees {
			id := layout.LayerID(t.Name())
			if c.exists(layout.LayerNode(id)) && c.gone(layout.LayerPath(id)) {
				out[path.Join(rel, t.Name())] = id
			}
		}
	}
	return out
}

// maxIngestInfo bounds the description of an ingest: a digest and labels.
const maxIngestInfo = 1 << 20

// ingestContent: N1. One that is being made has not everything yet.
func (c *checker) ingestContent(f found) {
	for _, e := range c.dirs[layout.IngestDir] {
		object, rel := "ingest "+printable(e.Name()), layout.IngestPath(layout.IngestID(e.Name()))
		entries, err := c.readDir(rel)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			f(object, rel, "%v", err)
			continue
		}
		for _, file := range entries {
			name := path.Join(rel, file.Name())
			switch {
			case file.Name() != layout.IngestData && file.Name() != layout.IngestInfo:
				f(object, name, "an ingest has no such file")
			case !file.Type().IsRegular():
				f(object, name, "it is no regular file but %v", file.Type())
			case file.Name() == layout.IngestInfo:
				if err := c.ingestInfo(name); err != nil {
					f(object, name, "%v", err)
				}
			}
		}
	}
}

func (c *checker) ingestInfo(rel string) error {
	file, err := reach.Regular(c.fd(), rel)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxIngestInfo))
	if err != nil {
		return err
	}
	var rec layout.IngestRecord
	if err := json.Unmarshal(data, &rec); err != nil {
		return fmt.Errorf("it does not decode: %w", err)
	}
	return nil
}
