package reach

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrMemory means that the page cache has other bytes of a file than the disk:
// whoever reads the file gets those, until the machine forgets them.
var ErrMemory = errors.New("in memory are other bytes than on the disk")

const (
	// window is how much a Reader reads at once.
	window = 256 << 10
	// alignment is enough for the direct reads of every file system and
	// block device with blocks of at most a page.
	alignment = 4096
)

// Reader reads files from the disk, past the page cache, which has good bytes
// of what went bad below it and keeps room for others' files; where a file
// system cannot (O_DIRECT), as usual. It is for one goroutine; files are closed
// after each.
type Reader struct{ disk, cached []byte }

// NewReader returns a Reader with its buffers, 512 KiB.
func NewReader() *Reader { return &Reader{disk: aligned(window), cached: aligned(window)} }

// aligned returns a buffer for direct reads. Its pages are there: btrfs fills
// others from the page cache (docs/design/0006-repair-under-containers.md).
func aligned(size int) []byte {
	buf := make([]byte, size+alignment)
	for i := 0; i < len(buf); i += alignment {
		buf[i] = 1
	}
	off := -int(uintptr(unsafe.Pointer(&buf[0]))) & (alignment - 1)
	return buf[off : off+size]
}

// Read hands out the bytes of the regular file at name, as they are on the
// disk, piece by piece; a piece is good until fn returns. If the page cache has
// other bytes, ErrMemory is returned when the file has been read. Read ends
// with ctx, with what fn returns, or as [Regular] does.
func (r *Reader) Read(ctx context.Context, dirfd int, name string, fn func(piece []byte) error) error {
	file, err := Regular(dirfd, name)
	if err != nil {
		return err
	}
	defer file.Close()
	direct, err := again(file, unix.O_DIRECT)
	if errors.Is(err, unix.EINVAL) {
		return r.plainly(ctx, file, 0, fn)
	}
	if err != nil {
		return err
	}
	defer direct.Close()
	fi, err := file.Stat()
	if err != nil {
		return err
	}
	var memory error
	for at := int64(0); at < fi.Size(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := pread(direct, r.disk, at)
		if n == 0 && err == nil {
			break // it has become shorter
		}
		if errors.Is(err, unix.EINVAL) || n%alignment != 0 && at+int64(n) < fi.Size() { // stricter than O_DIRECT promised
			return errors.Join(r.plainly(ctx, file, at, fn), memory)
		}
		if err != nil {
			return &fs.PathError{Op: "read", Path: name, Err: err}
		}
		if memory == nil && !r.sameInMemory(file, at, n) {
			memory = fmt.Errorf("from byte %d on: %w", at, ErrMemory)
		}
		if err := fn(r.disk[:n]); err != nil {
			return err
		}
		at += int64(n)
	}
	return memory
}

// pread reads once: where a direct read ends short the next must not begin.
func pread(f *os.File, buf []byte, at int64) (n int, err error) {
	for {
		if n, err = unix.Pread(int(f.Fd()), buf, at); err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

func (r *Reader) plainly(ctx context.Context, file *os.File, at int64, fn func([]byte) error) error {
	in := io.NewSectionReader(file, at, math.MaxInt64-at)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := in.Read(r.disk)
		if n > 0 {
			if err := fn(r.disk[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// sameInMemory compares what was read with those of its pages that the page
// cache has. It reads no others: that would ask the disk again, and keep them.
func (r *Reader) sameInMemory(file *os.File, at int64, n int) bool {
	page := os.Getpagesize()
	switch cached := cachedPages(file, at, n); {
	case cached == 0:
		return true
	case cached >= (n+page-1)/page:
		return r.sameBytes(file, at, 0, n)
	}
	for from := 0; from < n; from += page {
		size := min(page, n-from)
		if cachedPages(file, at+int64(from), size) > 0 && !r.sameBytes(file, at, from, size) {
			return false
		}
	}
	return true
}

func (r *Reader) sameBytes(file *os.File, at int64, from, size int) bool {
	m, err := pread(file, r.cached[:size], at+int64(from))
	return err != nil || bytes.Equal(r.cached[:m], r.disk[from:from+size])
}

// cachedPages is how many pages of a part of a file are in memory; 0 where the
// kernel cannot say, before Linux 6.5.
func cachedPages(file *os.File, at int64, n int) int {
	var stat unix.Cachestat_t
	if err := unix.Cachestat(uint(file.Fd()), &unix.CachestatRange{Off: uint64(at), Len: uint64(n)}, &stat, 0); err != nil {
		return 0
	}
	return int(stat.Cache)
}

// Forget drops what the page cache has of the file, but for pages that somebody
// has mapped or written to.
func Forget(dirfd int, name string) error {
	file, err := Regular(dirfd, name)
	if err != nil {
		return err
	}
	defer file.Close()
	return unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED)
}
