package corrupt

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Blobs and their places.
var blobKinds = []Kind{
	{"missing or short blob", "a blob's file is missing, or too short", eachBlob(anyBlob, func(s *store, digest, at string) error {
		if s.coin() {
			s.did("%s deleted", digest)
			s.must("B1", blobObject(digest), blobPath(digest))
			return os.Remove(at)
		}
		s.did("%s cut short", digest)
		s.must("B2", blobObject(digest), blobPath(digest))
		return os.Truncate(at, s.Int64N(s.size(blobPath(digest))))
	})},
	{"long blob", "a blob has something after its end", eachBlob(anyBlob, func(s *store, digest, at string) error {
		s.did("%s has a byte more", digest)
		s.must("B2", blobObject(digest), blobPath(digest))
		return os.Truncate(at, s.size(blobPath(digest))+1)
	})},
	{"blob flipped", "a blob of the right length has a wrong bit", eachBlob(anyBlob, flipBlob)},
	{"document flipped", "a manifest or config has a wrong bit", eachBlob(isJSON, flipBlob)},
	{"file manifest flipped", "what a layer has to hold has a wrong bit", func(s *store) error {
		_, layer, err := s.anyLayer()
		if err != nil {
			return err
		}
		digest := layer.text("manifest")
		return flipBlob(s, digest, s.path(blobPath(digest)))
	}},
	{"blob zeros", "a blob of the right length is all NUL", eachBlob(anyBlob, func(s *store, digest, at string) error {
		s.did("%s filled with NUL", digest)
		s.must("B3", blobObject(digest), blobPath(digest))
		return fill(at, make([]byte, s.size(blobPath(digest))))
	})},
	{"swapped blobs", "two blobs stand under each other's digest", func(s *store) error {
		a, b, err := s.twoBlobs()
		if err != nil {
			return err
		}
		s.did("%s and %s swapped", a, b)
		invariant := "B2"
		if s.size(blobPath(a)) == s.size(blobPath(b)) {
			invariant = "B3"
		}
		s.must(invariant, blobObject(a), blobPath(a))
		s.must(invariant, blobObject(b), blobPath(b))
		return unix.Renameat2(unix.AT_FDCWD, s.path(blobPath(a)), unix.AT_FDCWD, s.path(blobPath(b)), unix.RENAME_EXCHANGE)
	}},
	{"blob mode", "a blob's file may be written to, or has a special mode", eachBlob(anyBlob, func(s *store, digest, at string) error {
		mode := []uint32{0o644, 0o666, 0o400, 0o4444, 0}[s.IntN(5)]
		s.did("%s has mode %#o", digest, mode)
		s.must("B5", blobObject(digest), blobPath(digest))
		return unix.Chmod(at, mode)
	})},
	{"blob owner", "a blob's file belongs to somebody else", eachBlob(anyBlob, func(s *store, digest, at string) error {
		s.did("%s belongs to 1000:1000", digest)
		s.must("B5", blobObject(digest), blobPath(digest))
		return os.Chown(at, 1000, 1000)
	})},
	{"blob is something else", "a directory, a link to the blob, a fifo or a device stands for a blob", eachBlob(anyBlob, blobElse)},
	{"extra blob", "a file stands where only blobs may", extraBlob},
	{"blob in another place", "a blob stands in another shard, or has another name", eachBlob(anyBlob, func(s *store, digest, at string) error {
		to := filepath.Join(filepath.Dir(at), strings.ToUpper(filepath.Base(at)))
		if s.coin() {
			to = s.path("blobs", "sha256", s.otherShard(digest), filepath.Base(at))
		}
		rel, err := filepath.Rel(s.root, to)
		if err != nil {
			return err
		}
		s.did("%s stands at %s", digest, rel)
		s.must("B1", blobObject(digest), blobPath(digest))
		s.must("B4", entryObject(filepath.Base(to)), rel)
		return os.Rename(at, to)
	})},
	{"shard", "a directory of blobs is missing, or a link to where it has gone", shard},
}

func anyBlob(*store, string) bool { return true }

func isJSON(s *store, digest string) bool {
	data, err := os.ReadFile(s.path(blobPath(digest)))
	return err == nil && json.Valid(data)
}

func eachBlob(ok func(s *store, digest string) bool, do func(s *store, digest, at string) error) func(*store) error {
	return func(s *store) error {
		all, err := s.recorded(func(d string) bool { return s.size(blobPath(d)) > 0 && ok(s, d) })
		if err != nil {
			return err
		}
		digest, err := pickOne(s, "blob", all)
		if err != nil {
			return err
		}
		return do(s, digest, s.path(blobPath(digest)))
	}
}

// flipBlob changes one bit, and leaves the mode as it is.
func flipBlob(s *store, digest, at string) error {
	where, bit := s.Int64N(s.size(blobPath(digest))), s.IntN(8)
	s.did("%s: bit %d of byte %d flipped", digest, bit, where)
	s.must("B3", blobObject(digest), blobPath(digest))
	return rewrite(at, func(f *os.File) error { return flip(f, where, bit) })
}

func (s *store) twoBlobs() (a, b string, err error) {
	all, err := s.recorded(func(string) bool { return true })
	if err != nil {
		return "", "", err
	}
	s.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	if len(all) < 2 {
		return "", "", errors.New("the store has no two blobs")
	}
	return all[0], all[1], nil
}

func (s *store) otherShard(digest string) string {
	for {
		if shard := s.hex(2); !strings.HasPrefix(digest, "sha256:"+shard) {
			return shard
		}
	}
}

func blobElse(s *store, digest, at string) error {
	aside, err := s.aside()
	if err != nil {
		return err
	}
	to := filepath.Join(aside, "blob")
	s.must("B1", blobObject(digest), blobPath(digest))
	if err := os.Rename(at, to); err != nil {
		return err
	}
	switch s.IntN(4) {
	case 0:
		s.did("%s is a directory", digest)
		return os.Mkdir(at, 0o755)
	case 1:
		s.did("%s is a link to the blob, outside of the store", digest)
		return os.Symlink(to, at)
	case 2:
		s.did("%s is a fifo", digest)
		return unix.Mkfifo(at, 0o444)
	default:
		s.did("%s is a device", digest)
		return unix.Mknod(at, unix.S_IFCHR|0o444, int(unix.Mkdev(1, 5))) // zeros for ever
	}
}

func extraBlob(s *store) error {
	name := s.hex(64)
	rel := filepath.Join("blobs", "sha256", name[:2], name)
	switch s.IntN(4) {
	case 0:
		rel = filepath.Join("blobs", "sha256", name[:2], "notes.txt")
	case 1:
		rel = filepath.Join("blobs", "sha256", name)
	case 2:
		rel = filepath.Join("blobs", "sha512")
	}
	s.did("%s is there", rel)
	s.must("B4", entryObject(filepath.Base(rel)), rel)
	return s.stranger(rel, s.coin())
}

func shard(s *store) error {
	all, err := s.recorded(func(string) bool { return true })
	if err != nil {
		return err
	}
	name := s.hex(2) // often an empty one
	if s.coin() {
		name = strings.TrimPrefix(all[s.IntN(len(all))], "sha256:")[:2]
	}
	rel := filepath.Join("blobs", "sha256", name)
	for _, d := range all {
		if strings.HasPrefix(d, "sha256:"+name) {
			s.must("B1", blobObject(d), blobPath(d))
		}
	}
	return s.displace(rel)
}

// displace takes a directory of the format away, or puts a link in its place
// to where it has gone.
func (s *store) displace(rel string) error {
	s.must("R2", "store", rel)
	aside, err := s.aside()
	if err != nil {
		return err
	}
	to := filepath.Join(aside, filepath.Base(rel))
	if err := os.Rename(s.path(rel), to); err != nil {
		return err
	}
	switch s.IntN(3) {
	case 0:
		s.did("%s is missing", rel)
		return nil
	case 1:
		s.did("%s is a file", rel)
		return os.WriteFile(s.path(rel), nil, 0o644)
	}
	s.did("%s is a link to where it has gone", rel)
	return os.Symlink(to, s.path(rel))
}
