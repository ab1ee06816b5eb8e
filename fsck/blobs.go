package fsck

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"

	"varve.dev/fsck/reach"
	"varve.dev/layout"
)

func blobObject(d layout.BlobDigest) string { return "blob " + string(d) }

// blobFile is what stands where a recorded blob should. Only regular files
// are of interest to more than B1.
func (c *checker) blobFile(d layout.BlobDigest) (fi fs.FileInfo, err error) {
	fi, err = reach.Stat(c.fd(), layout.BlobPath(d))
	if err == nil && !fi.Mode().IsRegular() {
		return fi, reach.ErrNotRegular
	}
	return fi, err
}

// blobStands: B1.
func (c *checker) blobStands(f found) {
	for d := range c.rec.blobs {
		fi, err := c.blobFile(d)
		switch {
		case reach.Missing(err):
			f(blobObject(d), layout.BlobPath(d), "the file is missing")
		case errors.Is(err, reach.ErrNotRegular):
			f(blobObject(d), layout.BlobPath(d), "it is no regular file but %v", fi.Mode().Type())
		case err != nil:
			f(blobObject(d), layout.BlobPath(d), "%v", err)
		}
	}
}

// blobSize: B2.
func (c *checker) blobSize(f found) {
	for d, rec := range c.rec.blobs {
		if fi, err := c.blobFile(d); err == nil && fi.Size() != rec.Size {
			f(blobObject(d), layout.BlobPath(d), "%d bytes, recorded are %d", fi.Size(), rec.Size)
		}
	}
}

// blobMode: B5.
func (c *checker) blobMode(f found) {
	for d := range c.rec.blobs {
		if fi, err := c.blobFile(d); err == nil && (permissions(fi) != 0o444 || owner(fi) != 0) {
			f(blobObject(d), layout.BlobPath(d), "mode %v, user %d", fi.Mode(), owner(fi))
		}
	}
}

// intact tells whether B1 and B2 hold for a blob: what is broken otherwise is
// not said again by those who read it.
func (c *checker) intact(d layout.BlobDigest) bool {
	rec, ok := c.rec.blobs[d]
	if !ok {
		return false
	}
	fi, err := c.blobFile(d)
	return err == nil && fi.Size() == rec.Size
}

// blobNamed: B4.
func (c *checker) blobNamed(f found) {
	shards := map[string]bool{}
	for _, d := range layout.Dirs() {
		shards[d.Path] = true
	}
	under := c.underWay()
	for dir, entries := range c.dirs {
		if dir != layout.BlobsDir && !strings.HasPrefix(dir, layout.BlobsDir+"/") {
			continue
		}
		for _, e := range entries {
			rel := path.Join(dir, e.Name())
			d := layout.BlobDigest(string(layout.Algorithm) + ":" + e.Name())
			recorded := blobKey(string(d)) == nil && layout.BlobPath(d) == rel && c.exists(layout.BlobNode(d))
			if !recorded && !under[rel] && !shards[rel] {
				f("entry "+printable(e.Name()), rel, "nothing names it")
			}
		}
	}
}

// blobDigest: B3.
func (c *checker) blobDigest(f found) {
	todo := make(chan layout.BlobDigest)
	var workers sync.WaitGroup
	for range c.opts.Workers {
		workers.Go(func() {
			reader := reach.NewReader()
			for d := range todo {
				if c.hashes(d) {
					c.digestOf(reader, d, f)
				}
				c.blobs.done(c, d)
			}
		})
	}
	for _, d := range c.blobs.list {
		todo <- d
	}
	close(todo)
	workers.Wait()
}

// reads tells whether this look holds a blob against its digest by B3.
func (c *checker) reads(d layout.BlobDigest) bool {
	if !c.asked("B3") {
		return false
	}
	_, listed := slices.BinarySearch(c.blobs.list, d)
	return listed && c.drawn(string(d))
}

func (c *checker) digestOf(reader *reach.Reader, d layout.BlobDigest, f found) {
	if c.ctx.Err() != nil || !c.intact(d) {
		return
	}
	sum, err := c.hash(reader, c.fd(), layout.BlobPath(d))
	switch {
	case errors.Is(err, fs.ErrNotExist), c.ctx.Err() != nil: // removed since
	case sum != "" && sum != d.Hex():
		f(blobObject(d), layout.BlobPath(d), "the bytes have the digest sha256:%s", sum)
	case err != nil:
		f(blobObject(d), layout.BlobPath(d), "%v", err)
	}
}

// hash reads a regular file, whose sum it returns with reach.ErrMemory too. It
// tells Progress, and ends with the context.
func (c *checker) hash(reader *reach.Reader, dirfd int, name string) (sum string, err error) {
	h := sha256.New()
	err = reader.Read(c.ctx, dirfd, name, func(piece []byte) error {
		for part := range slices.Chunk(piece, burst) {
			if c.limit.WaitN(c.ctx, len(part)) != nil {
				<-c.ctx.Done() // which it has seen, or foreseen
				return c.ctx.Err()
			}
		}
		h.Write(piece)
		now := c.bytes.Add(int64(len(piece)))
		if c.opts.Progress != nil {
			c.opts.Progress(now, max(now, c.total))
		}
		return nil
	})
	if err == nil || errors.Is(err, reach.ErrMemory) {
		sum = hex.EncodeToString(h.Sum(nil))
	}
	return sum, err
}

// errNotItsBytes means that a blob has other bytes than its digest's, which a
// deep check says by B3.
var errNotItsBytes = errors.New("its bytes do not have its digest")

// readBlob reads a blob of a bounded size whole. What it says is true only if
// the bytes are the right ones, and of wrong ones nothing follows.
func (c *checker) readBlob(d layout.BlobDigest, limit int64) ([]byte, error) {
	file, err := reach.Regular(c.fd(), layout.BlobPath(d))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = errors.New("it is longer than anything of its kind")
	}
	if sum := sha256.Sum256(data); err == nil && hex.EncodeToString(sum[:]) != d.Hex() {
		err = errNotItsBytes
	}
	return data, err
}
