package corrupt

import (
	"errors"
	"path/filepath"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// Records, with the right checksum unless it says otherwise.
var recordKinds = []Kind{
	{"lost record", "a record is gone, its files and edges are not", lostRecord},
	{"record flipped", "a bit of a record is the other one", func(s *store) error {
		bucket, key, err := s.anyRecord()
		if err != nil {
			return err
		}
		s.did("%s, a bit flipped", recordObject(bucket, key))
		s.must("M1", recordObject(bucket, key), databaseFile)
		return s.raw(bucket, key, func(value []byte) []byte {
			value[s.IntN(len(value))] ^= 1 << s.IntN(8)
			return value
		})
	}},
	{"torn record", "a record is cut short, or empty", func(s *store) error {
		bucket, key, err := s.anyRecord()
		if err != nil {
			return err
		}
		s.did("%s cut short", recordObject(bucket, key))
		s.must("M1", recordObject(bucket, key), databaseFile)
		return s.raw(bucket, key, func(value []byte) []byte { return value[:s.IntN(len(value))] })
	}},
	{"record of another", "a record stands under the key of another one", func(s *store) error {
		bucket, key, err := s.anyRecord()
		if err != nil {
			return err
		}
		s.did("%s has the record of another key", recordObject(bucket, key))
		s.must("M1", recordObject(bucket, key), databaseFile)
		return s.raw(bucket, key, func(value []byte) []byte { return sealed("another "+key, value[checksum:]) })
	}},
	{"record of another kind", "a record is no record but a number", func(s *store) error {
		bucket, key, err := s.anyRecord()
		if err != nil {
			return err
		}
		s.did("%s is a number", recordObject(bucket, key))
		s.must("M1", recordObject(bucket, key), databaseFile)
		return s.raw(bucket, key, func([]byte) []byte { return sealed(key, []byte("17")) })
	}},
	{"bad key", "a record has a key that cannot be one", func(s *store) error {
		bucket := []string{"blobs", "layerkeys", "edges", "edgesback", "meta", "cachebyuse"}[s.IntN(6)]
		key := s.hex(6)
		s.did("%s is there", recordObject(bucket, key))
		s.must("M3", recordObject(bucket, key), databaseFile)
		if bucket != "cachebyuse" { // a log that was read from it has them too
			s.may(Finding{Invariant: "M4", About: key})
		}
		return s.update(func(tx *bolt.Tx) error {
			return tx.Bucket([]byte(bucket)).Put([]byte(key), sealed(key, []byte("{}")))
		})
	}},
	{"snapshot of another layer", "a snapshot names the layer of another one", otherLayer},
	{"snapshots in a circle", "a snapshot stands on one that stands on it", circle},
	{"image of another", "an image's name leads to what another one leads to", otherImage},
	{"wrong size", "a layer's record is wrong about its size or inodes", func(s *store) error {
		id, _, err := s.anyLayer()
		if err != nil {
			return err
		}
		field := []string{"size", "inodes"}[s.IntN(2)]
		s.did("layer %s: %s is wrong", id, field)
		s.must("L6", layerObject(id), "")
		return s.edit("layers", id, func(r record) { r[field] = 4096*(1+s.IntN(100)) + 1 })
	}},
	{"wrong blob size", "a blob's record is wrong about its size", func(s *store) error {
		all, err := s.recorded(func(string) bool { return true })
		if err != nil {
			return err
		}
		digest, err := pickOne(s, "blob", all)
		if err != nil {
			return err
		}
		s.did("%s: its recorded size is wrong", digest)
		s.must("B2", blobObject(digest), blobPath(digest))
		return s.edit("blobs", digest, func(r record) { r["size"] = s.size(blobPath(digest)) + 1 + s.Int64N(100) })
	}},
	{"layer key", "a layer cannot be found by its content, or another one is found", layerKey},
	{"cache place", "a step's place by last use is missing or another", func(s *store) error {
		keys, err := s.keys("cachebyuse")
		if err != nil {
			return err
		}
		use, err := pickOne(s, "place by last use", keys)
		if err != nil {
			return err
		}
		s.did("cache %q: its place by last use", use[8:])
		s.must("K1", cacheObject(use[8:]), "")
		gone := s.coin()
		return s.update(func(tx *bolt.Tx) error {
			b := tx.Bucket([]byte("cachebyuse"))
			if gone {
				return b.Delete([]byte(use))
			}
			return errors.Join(b.Delete([]byte(use)), b.Put([]byte("\x00\x00\x00\x00\x00\x00\x00\x01"+use[8:]), nil))
		})
	}},
	{"wrong account", "what the records add up to is another number", func(s *store) error {
		s.must("A1", "accounts", "")
		return s.sealed(func(tx *bolt.Tx) error {
			st, err := readState(tx)
			if err != nil {
				return err
			}
			name, err := pickOne(s, "account", sorted(st.Accounts))
			if err != nil {
				return err
			}
			field := []string{"count", "bytes", "inodes"}[s.IntN(3)]
			s.did("account %s: %s is wrong", name, field)
			st.Accounts[name][field] += 1 + s.Int64N(100_000)
			return writeState(tx, st)
		})
	}},
	{"lost entry", "a bucket lost an entry, and its sum tells", func(s *store) error {
		bucket := []string{"leases", "sweeps", "cachebyuse", "blobs", "edges", "edgesback"}[s.IntN(6)]
		keys, err := s.keys(bucket)
		if err != nil {
			return err
		}
		s.must("M5", theDatabase, databaseFile)
		s.may(Finding{}) // whatever it was is missing
		if len(keys) == 0 {
			s.did("a commit to the database that is not in its state record")
			return s.transaction(func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucket)).Put([]byte("x"), nil) })
		}
		key := keys[s.IntN(len(keys))]
		s.did("%s deleted, its sum not changed", recordObject(bucket, key))
		return s.transaction(func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucket)).Delete([]byte(key)) })
	}},
	{"lost store record", "the record of the store itself is gone", func(s *store) error {
		s.did("the store's own record deleted")
		s.must("M2", theDatabase, databaseFile)
		s.may(Finding{Invariant: "M4", Object: theLog})
		return s.update(func(tx *bolt.Tx) error { return tx.Bucket([]byte("meta")).Delete([]byte("store")) })
	}},
	{"lost bucket", "a bucket is gone", func(s *store) error {
		bucket := []string{"leases", "intents", "sweeps", "logtail", "cachebyuse", "edgesback", "containers", "uses", "measures"}[s.IntN(9)]
		s.did("bucket %s deleted", bucket)
		s.must("M2", theDatabase, databaseFile)
		s.may(Finding{}) // whatever was in it is missing
		return s.update(func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte(bucket)) })
	}},
}

// recordBuckets are those whose values are records.
var recordBuckets = []string{"blobs", "layers", "layerkeys", "snapshots", "images", "containers", "cache"}

// anyLayer picks a recorded layer.
func (s *store) anyLayer() (id string, rec record, err error) {
	layers, err := s.records("layers")
	if err != nil {
		return "", nil, err
	}
	id, err = pickOne(s, "layer", sorted(layers))
	return id, layers[id], err
}

func (s *store) anyRecord() (bucket, key string, err error) {
	bucket = recordBuckets[s.IntN(len(recordBuckets))]
	keys, err := s.keys(bucket)
	if err != nil {
		return "", "", err
	}
	key, err = pickOne(s, "record in "+bucket, keys)
	return bucket, key, err
}

// nodeKind is what a bucket's records are called as ends of edges.
var nodeKind = map[string]string{
	"blobs": "blob", "layers": "layer", "snapshots": "snapshot", "images": "image", "containers": "container", "cache": "cache",
}

func lostRecord(s *store) error {
	bucket, key, err := s.anyRecord()
	if err != nil {
		return err
	}
	s.did("%s deleted", recordObject(bucket, key))
	s.may(Finding{About: key})
	switch bucket {
	case "blobs":
		s.must("B4", "", blobPath(key))
	case "layers":
		s.must("L2", entryObject(key), filepath.Join("layers", key))
	case "containers":
		s.must("C2", entryObject(key), filepath.Join("containers", key))
	case "cache":
		s.must("K1", cacheObject(key), "")
	case "layerkeys":
		s.damage.Must = append(s.damage.Must, Finding{Invariant: "L5", About: key})
	}
	edges, err := s.edgesOf(nodeKind[bucket] + ":" + key)
	if err != nil {
		return err
	}
	for _, e := range edges {
		s.must("E2", e.object(), "")
	}
	if bucket == "snapshots" { // its directory is nobody's then
		all, err := s.records(bucket)
		if err != nil {
			return err
		}
		if r := all[key]; r.text("kind") == "active" {
			s.must("S4", entryObject(r.text("layer")), filepath.Join("active", r.text("layer")))
		}
	}
	return s.commit(change{Bucket: bucket, Key: key})
}

// committed returns the committed snapshots.
func (s *store) committed() (map[string]record, error) {
	all, err := s.records("snapshots")
	for key, r := range all {
		if r.text("kind") != "committed" {
			delete(all, key)
		}
	}
	return all, err
}

func otherLayer(s *store) error {
	all, err := s.committed()
	if err != nil {
		return err
	}
	key, err := pickOne(s, "committed snapshot", sorted(all))
	if err != nil {
		return err
	}
	layers, err := s.layers()
	if err != nil {
		return err
	}
	old := all[key].text("layer")
	other, err := pickOne(s, "other layer", slices.DeleteFunc(layers, func(l string) bool { return l == old }))
	if err != nil {
		return err
	}
	s.did("snapshot %q names layer %s, not %s", key, other, old)
	s.must("E3", edge{"snapshot:" + key, "tree", "layer:" + other}.object(), "")
	s.must("E3", edge{"snapshot:" + key, "tree", "layer:" + old}.object(), "")
	s.may(Finding{Invariant: "I3"}) // the image's chain is another now
	return s.edit("snapshots", key, func(r record) { r["layer"] = other })
}

func circle(s *store) error {
	all, err := s.committed()
	if err != nil {
		return err
	}
	top, err := pickOne(s, "snapshot on another", slices.DeleteFunc(sorted(all), func(k string) bool { return all[k].text("parent") == "" }))
	if err != nil {
		return err
	}
	bottom := all[top].text("parent")
	s.did("snapshot %q stands on %q, which stands on it", bottom, top)
	s.must("S1", snapshotObject(bottom), "")
	for _, key := range sorted(all) { // all above run into the circle
		s.may(Finding{Invariant: "S1", Object: snapshotObject(key)})
	}
	s.may(Finding{Invariant: "S1"})
	s.may(Finding{Invariant: "I3"})
	old := all[bottom].text("parent")
	s.must("E3", edge{"snapshot:" + bottom, "parent", "snapshot:" + top}.object(), "")
	if old != "" {
		s.must("E3", edge{"snapshot:" + bottom, "parent", "snapshot:" + old}.object(), "")
	}
	return s.edit("snapshots", bottom, func(r record) { r["parent"] = top })
}

func otherImage(s *store) error {
	all, err := s.records("images")
	if err != nil {
		return err
	}
	digest := func(name string) string {
		target, _ := all[name]["target"].(map[string]any)
		d, _ := target["digest"].(string)
		return d
	}
	name, err := pickOne(s, "image", sorted(all))
	if err != nil {
		return err
	}
	other, err := pickOne(s, "image of something else", slices.DeleteFunc(sorted(all), func(n string) bool { return digest(n) == digest(name) }))
	if err != nil {
		return err
	}
	s.did("image %q leads to what %q leads to", name, other)
	s.must("E3", edge{"image:" + name, "target", "blob:" + digest(other)}.object(), "")
	s.must("E3", edge{"image:" + name, "target", "blob:" + digest(name)}.object(), "")
	target := all[other]["target"]
	return s.edit("images", name, func(r record) { r["target"] = target })
}

// layerKey makes an index entry name another layer, or takes it away.
func layerKey(s *store) error {
	keys, err := s.keys("layerkeys")
	if err != nil {
		return err
	}
	key, err := pickOne(s, "layer key", keys)
	if err != nil {
		return err
	}
	s.damage.Must = append(s.damage.Must, Finding{Invariant: "L5", About: key})
	if s.coin() {
		s.did("layer key %s deleted", key)
		return s.commit(change{Bucket: "layerkeys", Key: key})
	}
	layers, err := s.records("layers")
	if err != nil {
		return err
	}
	other, err := pickOne(s, "layer of another key", slices.DeleteFunc(sorted(layers), func(id string) bool {
		return "diff:"+layers[id].text("diffID") == key || "chain:"+layers[id].text("chainID") == key
	}))
	if err != nil {
		return err
	}
	s.did("layer key %s names layer %s", key, other)
	return s.commit(change{"layerkeys", key, jsonOf(other)})
}
