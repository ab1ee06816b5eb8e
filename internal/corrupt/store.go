package corrupt

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// store is a closed store that is being damaged.
type store struct {
	root string
	*rand.Rand
	damage Damage
}

func (s *store) path(rel ...string) string {
	return filepath.Join(append([]string{s.root}, rel...)...)
}

// The names of docs/FORMAT.md.
const (
	databaseFile = "varve.db"
	logFile      = "varve.log"
)

func blobPath(digest string) string {
	hex := strings.TrimPrefix(digest, "sha256:")
	return filepath.Join("blobs", "sha256", hex[:2], hex)
}

// Objects, as a report calls them.
func blobObject(digest string) string  { return "blob " + digest }
func layerObject(id string) string     { return "layer " + id }
func snapshotObject(key string) string { return fmt.Sprintf("snapshot %q", key) }
func cacheObject(key string) string    { return fmt.Sprintf("cache %q", key) }
func entryObject(name string) string   { return "entry " + name }
func recordObject(bucket, key string) string {
	return fmt.Sprintf("record %s/%q", bucket, key)
}

const theLog, theDatabase = "change log", "database"

// update changes the database, for every other seed as somebody does who knows
// nothing of the sums that buckets have.
func (s *store) update(f func(*bolt.Tx) error) error {
	if s.coin() {
		return s.sealed(f)
	}
	s.must("M5", theDatabase, databaseFile)
	s.may(Finding{Invariant: "M5"}) // of the buckets
	return s.transaction(f)
}

// sealed changes the database as varve itself would, with a bug.
func (s *store) sealed(f func(*bolt.Tx) error) error {
	return s.transaction(func(tx *bolt.Tx) error { return errors.Join(f(tx), addUp(tx)) })
}

func (s *store) transaction(f func(*bolt.Tx) error) error {
	// What is booked of records and edges is left as it was.
	s.may(Finding{Invariant: "A1"})
	s.may(Finding{Invariant: "E5"})
	db, err := bolt.Open(s.path(databaseFile), 0o600, nil)
	if err != nil {
		return err
	}
	return errors.Join(db.Update(f), db.Close())
}

// state is how far a database has got.
type state struct {
	Commit   uint64                      `json:"commit"`
	Change   uint64                      `json:"change"`
	Accounts map[string]map[string]int64 `json:"accounts,omitempty"`
}

const stateKey = "state"

func readState(tx *bolt.Tx) (st state, err error) {
	value := tx.Bucket([]byte("meta")).Get([]byte(stateKey))
	if len(value) < checksum {
		return st, errors.New("the database has no state record")
	}
	return st, json.Unmarshal(value[checksum:], &st)
}

func writeState(tx *bolt.Tx, st state) error {
	return tx.Bucket([]byte("meta")).Put([]byte(stateKey), sealed(stateKey, jsonOf(st)))
}

// addUp notes in the state record which commit this is, and gives each bucket
// the sum of its entries.
func addUp(tx *bolt.Tx) error {
	st, err := readState(tx)
	if err != nil {
		return err
	}
	st.Commit = uint64(tx.ID())
	if err := writeState(tx, st); err != nil {
		return err
	}
	return tx.ForEach(func(_ []byte, b *bolt.Bucket) error {
		sum := uint64(0)
		err := b.ForEach(func(k, v []byte) error {
			h := fnv.New64a()
			h.Write(k)
			h.Write(v[:min(checksum, len(v))])
			sum += h.Sum64()
			return nil
		})
		return errors.Join(err, b.SetSequence(sum))
	})
}

// view reads the database and changes none of its pages.
func (s *store) view(f func(*bolt.Tx) error) error {
	db, err := bolt.Open(s.path(databaseFile), 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true})
	if err != nil {
		return err
	}
	return errors.Join(db.View(f), db.Close())
}

// keys returns the keys of a bucket in order.
func (s *store) keys(bucket string) (keys []string, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte(bucket)).ForEach(func(k, _ []byte) error {
			keys = append(keys, string(k))
			return nil
		})
	})
	return keys, err
}

// checksum is the length of what begins a value: the CRC-32C of key and JSON.
const checksum = 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func sealed(key string, body []byte) []byte {
	sum := crc32.Update(crc32.Checksum([]byte(key), castagnoli), castagnoli, body)
	return append(binary.BigEndian.AppendUint32(nil, sum), body...)
}

// record is a value's JSON, with every field that it has.
type record map[string]any

// records reads a bucket whose values are objects.
func (s *store) records(bucket string) (out map[string]record, err error) {
	out = map[string]record{}
	err = s.view(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte(bucket)).ForEach(func(k, v []byte) error {
			var r record
			if err := json.Unmarshal(v[checksum:], &r); err != nil {
				return err
			}
			out[string(k)] = r
			return nil
		})
	})
	return out, err
}

// text returns a field of a record, "" if it has none.
func (r record) text(field string) string {
	v, _ := r[field].(string)
	return v
}

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// layers returns the recorded layers.
func (s *store) layers() ([]string, error) { return s.keys("layers") }

// recorded returns the digests of the recorded blobs that keep chooses.
func (s *store) recorded(keep func(digest string) bool) ([]string, error) {
	all, err := s.keys("blobs")
	return slices.DeleteFunc(all, func(d string) bool { return !keep(d) }), err
}

// size is that of a file in the store, 0 if there is none.
func (s *store) size(rel string) int64 {
	fi, err := os.Lstat(s.path(rel))
	if err != nil {
		return 0
	}
	return fi.Size()
}

// stranger makes something where nothing is expected: a file, or a directory
// with one in it.
func (s *store) stranger(rel string, directory bool) error {
	at := s.path(rel)
	if err := os.MkdirAll(filepath.Dir(at), 0o711); err != nil {
		return err
	}
	if !directory {
		return os.WriteFile(at, []byte("stranger\n"), 0o644)
	}
	return errors.Join(os.MkdirAll(filepath.Join(at, "fs"), 0o755), os.WriteFile(filepath.Join(at, "fs", "stranger"), []byte("stranger\n"), 0o644))
}

// aside is a folder outside of the store, beside it.
func (s *store) aside() (string, error) {
	return os.MkdirTemp(filepath.Dir(s.root), "aside-")
}

// instead takes a file of the store away, and may put something else in its
// place.
func instead(invariant, object, file string) func(*store) error {
	return func(s *store) error {
		s.must(invariant, object, file)
		at := s.path(file)
		aside, err := s.aside()
		if err != nil {
			return err
		}
		to := filepath.Join(aside, file)
		if err := os.Rename(at, to); err != nil {
			return err
		}
		switch s.IntN(5) {
		case 0:
			s.did("the %s is missing", object)
			return nil
		case 1:
			s.did("the %s is empty", object)
			return os.WriteFile(at, nil, 0o600)
		case 2:
			s.did("the %s is a fifo", object)
			return unix.Mkfifo(at, 0o600)
		case 3:
			s.did("the %s is a directory", object)
			return os.Mkdir(at, 0o700)
		}
		s.did("the %s is a link out of the store", object)
		return os.Symlink(to, at)
	}
}
