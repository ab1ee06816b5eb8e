package corrupt

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// The store's own directories, and what stands in them.
var directoryKinds = []Kind{
	{"orphan directory", "a directory in layers that nothing names", orphan("layers", "L2")},
	{"orphan writable layer", "a directory in active that nothing names", orphan("active", "S4")},
	{"orphan container", "a directory in containers that nothing names", orphan("containers", "C2")},
	{"left in staging", "something stands in staging while the store is closed", func(s *store) error {
		boot := s.hex(8)
		rel := filepath.Join("staging", boot)
		what := "a tree"
		switch s.IntN(3) {
		case 0:
			rel, what = filepath.Join(rel, s.hex(24)), "a tree of another boot"
		case 1:
			what = "a file"
		}
		s.did("%s: %s", rel, what)
		s.must("G1", entryObject(boot), filepath.Join("staging", boot))
		return s.stranger(rel, what != "a file")
	}},
	{"layer in staging", "a recorded layer stands in staging", eachLayer(func(s *store, layer string) error {
		rel := filepath.Join("staging", s.hex(8), layer)
		s.did("layer %s stands at %s", layer, rel)
		s.must("G2", layerObject(layer), rel)
		return errors.Join(os.MkdirAll(filepath.Dir(s.path(rel)), 0o700), os.Rename(s.path("layers", layer), s.path(rel)))
	})},
	{"missing layer", "a layer's directory, or the tree in it, is missing", eachLayer(func(s *store, layer string) error {
		rel := filepath.Join("layers", layer)
		if s.coin() {
			rel = filepath.Join(rel, "fs")
		}
		s.did("%s removed", rel)
		s.must("L1", layerObject(layer), "")
		return os.RemoveAll(s.path(rel))
	})},
	{"layer is something else", "a file, a fifo or a link stands for a layer's directory or tree", eachLayer(layerElse)},
	{"entry beside a tree", "a layer's directory has more in it than the tree", eachLayer(func(s *store, layer string) error {
		name := []string{"work", "fs.orig", "stranger"}[s.IntN(3)]
		rel := filepath.Join("layers", layer, name)
		s.did("%s is there", rel)
		s.must("L2", entryObject(name), rel)
		return s.stranger(rel, s.coin())
	})},
	{"missing writable layer", "the directory of a container's writable layer, or the tree in it, is missing", eachOf("active", func(s *store, id string) error {
		rel := filepath.Join("active", id)
		if s.coin() {
			rel = filepath.Join(rel, "fs")
		}
		s.did("%s removed", rel)
		s.must("S3", "", filepath.Join("active", id))
		return os.RemoveAll(s.path(rel))
	})},
	{"work is a file", "what overlayfs works in is no directory", eachOf("active", func(s *store, id string) error {
		rel := filepath.Join("active", id, "work")
		s.did("%s is a file", rel)
		s.must("S3", "", filepath.Join("active", id))
		return errors.Join(os.RemoveAll(s.path(rel)), os.WriteFile(s.path(rel), nil, 0o644))
	})},
	{"missing container", "a container's directory is missing", eachOf("containers", func(s *store, id string) error {
		s.did("containers/%s removed", id)
		s.must("C1", "container "+id, filepath.Join("containers", id))
		return os.RemoveAll(s.path("containers", id))
	})},
	{"container's config", "what a container is to run is missing, torn or something else", eachOf("containers", containerConfig)},
	{"ingest", "an unfinished blob is not what it has to be", eachOf("ingest", ingest)},
	{"missing store directory", "a directory of the format is missing, a file, or a link to where it has gone", storeDirectory},
	{"store directory mode", "a directory of the format lets others in", eachFormat(func(s *store, rel string) error {
		mode := []os.FileMode{0o777, 0o755, 0o000, 0o1711}[s.IntN(4)]
		s.did("%s has mode %#o", rel, mode)
		s.must("R2", "store", rel)
		return unix.Chmod(s.path(rel), uint32(mode))
	})},
	{"store directory owner", "a directory of the format belongs to somebody else", eachFormat(func(s *store, rel string) error {
		s.did("%s belongs to 1000:1000", rel)
		s.must("R2", "store", rel)
		return os.Chown(s.path(rel), 1000, 1000)
	})},
	{"stranger", "something in the root that the format does not know", func(s *store) error {
		name := []string{"lost", "varve.db.bak", "tmp", ".hidden", "blobs~"}[s.IntN(5)]
		s.did("%s is there", name)
		s.must("R1", "store", name)
		return s.stranger(name, s.coin())
	}},
}

// orphan makes a directory that nothing names.
func orphan(in, invariant string) func(*store) error {
	return func(s *store) error {
		name := []string{s.hex(24), "stranger", ".hidden", s.hex(64)}[s.IntN(4)]
		rel := filepath.Join(in, name)
		s.did("%s is there", rel)
		s.must(invariant, entryObject(name), rel)
		return s.stranger(rel, true)
	}
}

func eachLayer(do func(s *store, layer string) error) func(*store) error {
	return func(s *store) error {
		all, err := s.layers()
		if err != nil {
			return err
		}
		layer, err := pickOne(s, "layer", all)
		if err != nil {
			return err
		}
		return do(s, layer)
	}
}

// eachOf chooses what stands in a directory.
func eachOf(dir string, do func(s *store, name string) error) func(*store) error {
	return func(s *store) error {
		list, err := os.ReadDir(s.path(dir))
		if err != nil {
			return err
		}
		e, err := pickOne(s, "entry in "+dir, list)
		if err != nil {
			return err
		}
		return do(s, e.Name())
	}
}

// formatDirs are the directories of the format, without the shards.
var formatDirs = []string{
	"blobs", "blobs/sha256", "ingest", "layers", "active", "staging", "containers", "volumes", "cachemounts", "trash",
}

func eachFormat(do func(s *store, rel string) error) func(*store) error {
	return func(s *store) error {
		rel := formatDirs[s.IntN(len(formatDirs))]
		if s.IntN(4) == 0 {
			rel = "blobs/sha256/" + s.hex(2)
		}
		return do(s, rel)
	}
}

func layerElse(s *store, layer string) error {
	rel := filepath.Join("layers", layer)
	if s.coin() {
		rel = filepath.Join(rel, "fs")
	}
	aside, err := s.aside()
	if err != nil {
		return err
	}
	s.must("L1", layerObject(layer), "")
	at, to := s.path(rel), filepath.Join(aside, "moved")
	if err := os.Rename(at, to); err != nil {
		return err
	}
	switch s.IntN(3) {
	case 0:
		s.did("%s is a file", rel)
		return os.WriteFile(at, nil, 0o644)
	case 1:
		s.did("%s is a fifo", rel)
		return unix.Mkfifo(at, 0o600)
	}
	s.did("%s is a link to where it has gone", rel)
	return os.Symlink(to, at)
}

func containerConfig(s *store, id string) error {
	rel := filepath.Join("containers", id, []string{"config.json", "image.json"}[s.IntN(2)])
	at := s.path(rel)
	s.must("C1", "container "+id, rel)
	switch s.IntN(4) {
	case 0:
		s.did("%s removed", rel)
		return os.Remove(at)
	case 1:
		s.did("%s cut short", rel)
		return os.Truncate(at, s.Int64N(s.size(rel)-1))
	case 2:
		s.did("%s is a fifo", rel)
		return errors.Join(os.Remove(at), unix.Mkfifo(at, 0o600))
	}
	s.did("%s filled with NUL", rel)
	return fill(at, make([]byte, s.size(rel)))
}

func ingest(s *store, id string) error {
	dir := filepath.Join("ingest", id)
	object := "ingest " + id
	switch s.IntN(5) {
	case 0:
		s.did("%s/info is torn", dir)
		s.must("N1", object, dir+"/info")
		return os.Truncate(s.path(dir, "info"), s.Int64N(s.size(dir+"/info")-1))
	case 1:
		s.did("%s/more is there", dir)
		s.must("N1", object, dir+"/more")
		return s.stranger(filepath.Join(dir, "more"), s.coin())
	case 2:
		s.did("%s/data is a link out of the store", dir)
		s.must("N1", object, dir+"/data")
		return errors.Join(os.Remove(s.path(dir, "data")), os.Symlink("/etc/passwd", s.path(dir, "data")))
	case 3:
		s.did("%s/info is a fifo", dir)
		s.must("N1", object, dir+"/info")
		return errors.Join(os.Remove(s.path(dir, "info")), unix.Mkfifo(s.path(dir, "info"), 0o600))
	}
	s.did("ingest/stranger is a file")
	s.must("N1", "ingest stranger", "ingest/stranger")
	return s.stranger("ingest/stranger", false)
}

// storeDirectory displaces a directory of the format. What stood in it is
// missing too.
func storeDirectory(s *store) error {
	rel := formatDirs[s.IntN(len(formatDirs))]
	under := func(other string) bool { return strings.HasPrefix(other, rel+"/") }
	blobs, err := s.recorded(func(string) bool { return true })
	if err != nil {
		return err
	}
	layers, err := s.layers()
	if err != nil {
		return err
	}
	for _, d := range blobs {
		if under(blobPath(d)) {
			s.must("B1", blobObject(d), blobPath(d))
		}
	}
	for _, l := range layers {
		if rel == "layers" {
			s.must("L1", layerObject(l), "")
		}
	}
	for _, dir := range []string{"active", "containers"} {
		list, err := os.ReadDir(s.path(dir))
		if err != nil {
			return err
		}
		for _, e := range list {
			if rel == dir {
				s.must(map[string]string{"active": "S3", "containers": "C1"}[dir], "", filepath.Join(dir, e.Name()))
			}
		}
	}
	return s.displace(rel)
}

// jsonOf is for records that are written by hand.
func jsonOf(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // of maps and strings
	}
	return data
}
