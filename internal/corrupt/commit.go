package corrupt

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// logged are the buckets whose changes go into the change log.
var logged = []string{"blobs", "layers", "layerkeys", "snapshots", "images", "containers", "cache", "edges"}

// raw changes a value as it is stored.
func (s *store) raw(bucket, key string, change func([]byte) []byte) error {
	return s.update(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte(bucket))
		return b.Put([]byte(key), change(bytes.Clone(b.Get([]byte(key)))))
	})
}

// change is one of a record; no value deletes it. An edge has the value true.
type change struct {
	Bucket string          `json:"b"`
	Key    string          `json:"k"`
	Value  json.RawMessage `json:"v,omitempty"`
}

// commit makes changes in the database, and for every other seed in the change
// log as well, as varve itself would, with a bug. For the others the log does
// not fit the database any more.
func (s *store) commit(changes ...change) error {
	all := func(tx *bolt.Tx) (err error) {
		for _, c := range changes {
			err = errors.Join(err, apply(tx, c))
		}
		return err
	}
	told := slices.Clone(changes)
	told = slices.DeleteFunc(told, func(c change) bool { return !slices.Contains(logged, c.Bucket) })
	if len(told) == 0 {
		return s.update(all)
	}
	if s.coin() {
		s.must("M4", theLog, logFile)
		return s.update(all)
	}
	var st state
	err := s.sealed(func(tx *bolt.Tx) (err error) {
		if st, err = readState(tx); err != nil {
			return err
		}
		st.Change++
		return errors.Join(all(tx), writeState(tx, st))
	})
	if err != nil {
		return err
	}
	return s.appendLog(jsonOf(map[string]any{"seq": st.Change, "changes": told}))
}

func apply(tx *bolt.Tx, c change) error {
	b := tx.Bucket([]byte(c.Bucket))
	switch {
	case c.Value == nil:
		return b.Delete([]byte(c.Key))
	case c.Bucket == "edges" || c.Bucket == "edgesback":
		return b.Put([]byte(c.Key), nil)
	}
	return b.Put([]byte(c.Key), sealed(c.Key, c.Value))
}

// edit changes fields of a record.
func (s *store) edit(bucket, key string, fn func(record)) error {
	all, err := s.records(bucket)
	if err != nil {
		return err
	}
	fn(all[key])
	return s.commit(change{bucket, key, jsonOf(all[key])})
}
