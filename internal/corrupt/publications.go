package corrupt

import (
	"errors"
	"os"
	"path/filepath"

	bolt "go.etcd.io/bbolt"
)

// What is under way between records and files: publications and removals.
var publicationKinds = []Kind{
	{"sweep of what is there", "something that is recorded is to be deleted", sweepRecorded},
	{"sweep of anything", "something is to be deleted that no sweep is for", func(s *store) error {
		path := []string{"varve.db", "varve.log", "volumes", "layers", "blobs/sha256", "../elsewhere", "/etc", "active/../blobs", ""}[s.IntN(9)]
		return s.addSweep(path, "layer:"+s.hex(24))
	}},
	{"torn intent", "a publication is half done, or its intent is torn", tornIntent},
	{"lost intent", "a publication is half done and nothing says so", func(s *store) error {
		name := s.hex(64)
		if s.coin() {
			id := s.hex(24)
			s.did("layers/%s came of a publication that nothing tells of", id)
			s.must("L2", entryObject(id), "layers/"+id)
			return s.stranger("layers/"+id, true)
		}
		s.did("sha256:%s came of a publication that nothing tells of", name)
		s.must("B4", entryObject(name), blobPath("sha256:"+name))
		return s.stranger(blobPath("sha256:"+name), false)
	}},
}

func (s *store) addSweep(path, node string) error {
	id := s.hex(24)
	s.did("a sweep of %q, for %s", path, node)
	s.must("T2", "sweep "+id, path)
	sweep := record{"path": path, "node": node, "claimed": s.coin(), "created": "2024-02-29T12:00:00Z"}
	return s.commit(change{"sweeps", id, jsonOf(sweep)})
}

func sweepRecorded(s *store) error {
	layers, err := s.layers()
	if err != nil {
		return err
	}
	layer, err := pickOne(s, "layer", layers)
	if err != nil {
		return err
	}
	return s.addSweep("layers/"+layer, "layer:"+layer)
}

// tornIntent leaves a publication as a crash would, and its intent for every
// fourth seed as none would: cut short.
func tornIntent(s *store) error {
	id := s.hex(24)
	layer, rec, err := s.anyLayer()
	if err != nil {
		return err
	}
	from := filepath.Join("staging", s.hex(8), layer)
	move := map[string]any{"id": layer, "from": from, "record": rec}
	intent := record{"created": "2024-02-29T12:00:00Z", "purpose": "pull torn:" + s.hex(4), "layers": []any{move}}
	body := jsonOf(intent)
	switch s.IntN(4) {
	case 0:
		s.did("intent %s is torn", id)
		s.must("M1", recordObject("intents", id), databaseFile)
		return s.sealed(func(tx *bolt.Tx) error {
			return tx.Bucket([]byte("intents")).Put([]byte(id), sealed(id, body)[:s.IntN(len(body))])
		})
	case 1:
		s.did("intent %s names files that are nowhere", id)
		move["id"], move["from"] = s.hex(24), filepath.Join("staging", s.hex(8), "nowhere")
		body = jsonOf(intent)
	case 2:
		s.did("intent %s is open, layer %s stands in staging", id, layer)
		s.may(Finding{Invariant: "G2", Object: layerObject(layer)})
		if err := errors.Join(os.MkdirAll(filepath.Dir(s.path(from)), 0o700), os.Rename(s.path("layers", layer), s.path(from))); err != nil {
			return err
		}
	case 3:
		s.did("intent %s is open, and all of it done", id)
	}
	s.must("J1", "intent "+id, "")
	return s.sealed(func(tx *bolt.Tx) error { return apply(tx, change{"intents", id, body}) })
}
