package corrupt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// The database's file. bbolt has pages with a header: id, type, number of
// elements, pages that follow; the first two are meta pages.
var databaseKinds = []Kind{
	{"database missing", "the database is missing, empty, or something else", instead("M2", theDatabase, databaseFile)},
	{"database cut", "the database lost its end", func(s *store) error {
		size := s.Int64N(s.high() * page)
		s.did("the database cut to %d bytes", size)
		s.damaged()
		return os.Truncate(s.path(databaseFile), size)
	}},
	{"database page zeros", "a page of the database is all NUL", eachPage(anyPage, func(s *store, f *os.File, id int64) error {
		s.did("page %d of the database filled with NUL", id)
		_, err := f.WriteAt(make([]byte, page), id*page)
		return err
	})},
	{"database page of another", "a page of the database holds what another one has to", eachPage(anyPage, func(s *store, f *os.File, id int64) error {
		other := 2 + s.Int64N(s.high()-2)
		for other == id {
			other = 2 + s.Int64N(s.high()-2)
		}
		s.did("page %d of the database holds page %d", id, other)
		b := make([]byte, page)
		_, err := f.ReadAt(b, other*page)
		if err == nil {
			_, err = f.WriteAt(b, id*page)
		}
		return err
	})},
	{"database header flipped", "a bit in the header of a page is the other one", eachPage(anyPage, func(s *store, f *os.File, id int64) error {
		at, bit := s.Int64N(pageHeader), s.IntN(8)
		s.did("page %d of the database: bit %d of byte %d flipped", id, bit, at)
		return flip(f, id*page+at, bit)
	})},
	{"database page flipped", "a bit of what a page of the database holds is the other one", eachPage(leafPage, func(s *store, f *os.File, id int64) error {
		used, err := usedBytes(f, id)
		if err != nil {
			return err
		}
		at, bit := used[s.IntN(len(used))], s.IntN(8)
		s.did("page %d of the database: bit %d of byte %d flipped", id, bit, at)
		return flip(f, id*page+at, bit)
	})},
	{"free list flipped", "a bit of the list of free pages is the other one", eachPage(freelistPage, func(s *store, f *os.File, id int64) error {
		b := make([]byte, pageHeader)
		if _, err := f.ReadAt(b, id*page); err != nil {
			return err
		}
		n := int64(binary.LittleEndian.Uint16(b[10:]))
		if n == 0 {
			return errors.New("no page of the database is free")
		}
		at, bit := pageHeader+s.Int64N(n*8), s.IntN(8)
		s.did("free list on page %d of the database: bit %d of byte %d flipped", id, bit, at)
		return flip(f, id*page+at, bit)
	})},
	{"meta pages lost", "a meta page of the database is bad, or both are", func(s *store) error {
		which := [][]int64{{0}, {1}, {0, 1}}[s.IntN(3)]
		s.did("meta pages %v of the database are bad", which)
		s.must("M2", theDatabase, databaseFile)
		return rewrite(s.path(databaseFile), func(f *os.File) (err error) {
			at, bit := pageHeader+s.Int64N(metaLen), s.IntN(8)
			for _, id := range which {
				err = errors.Join(err, flip(f, id*page+at, bit))
			}
			return err
		})
	}},
	{"database mode", "others may read the database or the log", func(s *store) error {
		name := []string{databaseFile, logFile}[s.IntN(2)]
		mode := []uint32{0o644, 0o666, 0o660, 0o604}[s.IntN(4)]
		s.did("%s has mode %#o", name, mode)
		s.must("R2", "store", name)
		return unix.Chmod(s.path(name), mode)
	}},
}

const (
	pageHeader  = 16
	element     = 16 // of a leaf: flags, position, length of key and value
	metaLen     = 64
	metaCounter = pageHeader + 48 // number of the last transaction
	metaHigh    = pageHeader + 40
)

// damaged notes that the database is found to be damaged, somehow.
func (s *store) damaged() {
	for _, m := range []string{"M1", "M2", "M3", "M4", "M5", "E1"} {
		s.damage.OneOf = append(s.damage.OneOf, Finding{Invariant: m})
	}
	s.may(Finding{}) // records that cannot be read are missing everywhere
}

// high is the number of pages, by the newer meta page.
func (s *store) high() int64 {
	f, err := os.Open(s.path(databaseFile))
	if err != nil {
		return 3
	}
	defer f.Close()
	var newest, high uint64
	for meta := range int64(2) {
		b := make([]byte, page)
		if _, err := f.ReadAt(b, meta*page); err != nil {
			continue
		}
		if n := binary.LittleEndian.Uint64(b[metaCounter:]); n >= newest {
			newest, high = n, binary.LittleEndian.Uint64(b[metaHigh:])
		}
	}
	return int64(high)
}

func anyPage(kind string) bool      { return kind == "leaf" || kind == "branch" || kind == "freelist" }
func leafPage(kind string) bool     { return kind == "leaf" }
func freelistPage(kind string) bool { return kind == "freelist" }

// eachPage chooses a page that is in use.
func eachPage(ok func(kind string) bool, do func(s *store, f *os.File, id int64) error) func(*store) error {
	return func(s *store) error {
		var ids []int64
		err := s.view(func(tx *bolt.Tx) error {
			for id := 2; int64(id) < s.high(); {
				info, err := tx.Page(id)
				if err != nil || info == nil {
					return err
				}
				if ok(info.Type) {
					ids = append(ids, int64(id))
				}
				id += 1 + info.OverflowCount
			}
			return nil
		})
		if err != nil {
			return err
		}
		id, err := pickOne(s, "page", ids)
		if err != nil {
			return err
		}
		s.damaged()
		return rewrite(s.path(databaseFile), func(f *os.File) error { return do(s, f, id) })
	}
}

// usedBytes are the places in a leaf page that mean something: its elements,
// keys and values, as far as they are on the page itself.
func usedBytes(f *os.File, id int64) (used []int64, err error) {
	b := make([]byte, page)
	if _, err := f.ReadAt(b, id*page); err != nil {
		return nil, err
	}
	mark := func(from, to int64) {
		for at := from; at < min(to, page); at++ {
			used = append(used, at)
		}
	}
	for i := range int64(binary.LittleEndian.Uint16(b[10:])) {
		at := pageHeader + i*element
		e := b[at : at+element]
		mark(at, at+element)
		from := at + int64(binary.LittleEndian.Uint32(e[4:]))
		key, value := int64(binary.LittleEndian.Uint32(e[8:])), int64(binary.LittleEndian.Uint32(e[12:]))
		mark(from, from+key)
		if binary.LittleEndian.Uint32(e)&1 == 0 { // of a bucket not all is used
			mark(from+key, from+key+value)
		}
	}
	if len(used) == 0 {
		return nil, errors.New("the page is empty")
	}
	return used, nil
}

// deleting is a change of the database that takes one key away.
func deleting(bucket, key string) func(*bolt.Tx) error {
	return func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucket)).Delete(bytes.Clone([]byte(key))) }
}
