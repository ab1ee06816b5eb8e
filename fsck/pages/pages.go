// Package pages reads the structure of a bbolt file without bbolt, which
// panics, or goes round until memory ends, on one that is damaged. It changes
// nothing.
package pages

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"os"
)

// The page format of bbolt (its internal/common/page.go and meta.go), as far
// as it takes to see that walking the file ends. A branch page that leads back
// to itself makes bbolt's cursor go round until memory ends, which no recover
// catches.
const (
	pageHeader = 16 // id u64, flags u16, count u16, overflow u32
	element    = 16 // branch: pos, ksize u32, page u64; leaf: flags, pos, ksize, vsize u32
	branchPage = 0x01
	leafPage   = 0x02
	freePage   = 0x10
	noFreeList = 1<<64 - 1 // in place of its page

	bucketElement = 0x01
	bucketHeader  = 16 // root page u64, sequence u64

	metaMagic  = 0xED0CDAED
	metaSummed = 56 // bytes before the checksum
)

// pages is a walk over every page that can be reached from the root.
type pages struct {
	f    *os.File
	size int64  // of a page
	high uint64 // number of pages
	free uint64 // page of the free list
	seen []uint64
}

// Walk reads every page that can be reached from the root. An error says what
// is wrong; one in a [FreeListError] is no reason not to read the file, but
// what is written to it may overwrite what is there. Nobody may write to the
// file meanwhile.
func Walk(f *os.File) error {
	p := &pages{f: f}
	root, err := p.start()
	if err == nil {
		err = p.tree(root, keyRange{})
	}
	if err != nil {
		return err
	}
	if err := p.freeList(); err != nil {
		return &FreeListError{err}
	}
	return nil
}

// FreeListError says what is wrong with the list of free pages.
type FreeListError struct{ Err error }

func (e *FreeListError) Error() string { return "free list: " + e.Err.Error() }

// Unwrap gives the reason.
func (e *FreeListError) Unwrap() error { return e.Err }

// start reads the two meta pages, which must both be valid, and returns the
// root page by the newer one.
func (p *pages) start() (root uint64, err error) {
	fi, err := p.f.Stat()
	if err != nil {
		return 0, err
	}
	var newest uint64
	for i := range int64(2) { // the first says how long a page is
		m := make([]byte, metaSummed+8)
		if _, err := p.f.ReadAt(m, i*p.size+pageHeader); err != nil {
			return 0, fmt.Errorf("meta page %d: %w", i, err)
		}
		h := fnv.New64a()
		h.Write(m[:metaSummed])
		size := int64(binary.NativeEndian.Uint32(m[8:]))
		if binary.NativeEndian.Uint32(m) != metaMagic || binary.NativeEndian.Uint64(m[metaSummed:]) != h.Sum64() || size < 512 {
			return 0, fmt.Errorf("meta page %d is not valid", i)
		}
		p.size = size
		if tx := binary.NativeEndian.Uint64(m[48:]); i == 0 || tx > newest {
			newest = tx
			root, p.free, p.high = binary.NativeEndian.Uint64(m[16:]), binary.NativeEndian.Uint64(m[32:]), binary.NativeEndian.Uint64(m[40:])
		}
	}
	if have := uint64(fi.Size() / p.size); have < p.high {
		return 0, fmt.Errorf("%d pages long, its meta page says %d", have, p.high)
	}
	p.seen = make([]uint64, p.high/64+1)
	return root, nil
}

// read returns a page with what overflows from it. Each page has one use.
func (p *pages) read(id uint64) (flags, count uint16, data []byte, err error) {
	if err := p.use(id); err != nil {
		return 0, 0, nil, err
	}
	data = make([]byte, p.size)
	if _, err := p.f.ReadAt(data, int64(id)*p.size); err != nil {
		return 0, 0, nil, fmt.Errorf("page %d: %w", id, err)
	}
	if got := binary.NativeEndian.Uint64(data); got != id {
		return 0, 0, nil, fmt.Errorf("page %d calls itself %d", id, got)
	}
	flags, count = binary.NativeEndian.Uint16(data[8:]), binary.NativeEndian.Uint16(data[10:])
	more := uint64(binary.NativeEndian.Uint32(data[12:]))
	if more >= p.high-id {
		return 0, 0, nil, fmt.Errorf("page %d goes on for %d pages", id, more)
	}
	for i := range more {
		if err := p.use(id + 1 + i); err != nil {
			return 0, 0, nil, err
		}
	}
	if more > 0 {
		rest := make([]byte, int64(more)*p.size)
		if _, err := p.f.ReadAt(rest, int64(id+1)*p.size); err != nil {
			return 0, 0, nil, fmt.Errorf("page %d: %w", id, err)
		}
		data = append(data, rest...)
	}
	return flags, count, data, nil
}

func (p *pages) use(id uint64) error {
	if id < 2 || id >= p.high {
		return fmt.Errorf("page %d is referred to, the last is %d", id, p.high-1)
	}
	if p.seen[id/64]&(1<<(id%64)) != 0 {
		return fmt.Errorf("page %d is referred to twice", id)
	}
	p.seen[id/64] |= 1 << (id % 64)
	return nil
}

// freeList holds the list of free pages against those that the walk came to:
// each page is one or the other.
func (p *pages) freeList() error {
	if p.free == noFreeList {
		return nil
	}
	flags, count, data, err := p.read(p.free)
	if err != nil {
		return err
	}
	ids, n := data[pageHeader:], uint64(count)
	if n == 0xFFFF { // the number stands before the first
		n, ids = binary.NativeEndian.Uint64(ids), ids[8:]
	}
	if flags != freePage || n > uint64(len(ids))/8 {
		return fmt.Errorf("page %d has the type %#x and %d entries", p.free, flags, n)
	}
	for i := range n {
		if err := p.use(binary.NativeEndian.Uint64(ids[8*i:])); err != nil {
			return err
		}
	}
	for id := uint64(2); id < p.high; id++ {
		if p.seen[id/64]&(1<<(id%64)) == 0 {
			return fmt.Errorf("page %d is neither used nor free", id)
		}
	}
	return nil
}

// keyRange is where the keys of a page have to lie to be found.
type keyRange struct{ from, until []byte } // no until: to the end

// has tells whether a page may have the key as its i-th.
func (r keyRange) has(i int, key []byte) bool {
	if i == 0 && r.from != nil && !bytes.Equal(key, r.from) {
		return false
	}
	return r.until == nil || bytes.Compare(key, r.until) < 0
}

func (p *pages) tree(id uint64, keys keyRange) error {
	flags, count, data, err := p.read(id)
	if err != nil {
		return err
	}
	switch flags {
	case branchPage:
		if count == 0 {
			return fmt.Errorf("branch page %d is empty", id)
		}
		return p.branch(id, int(count), data, keys)
	case leafPage:
		return p.leaf(id, int(count), data, keys)
	}
	return fmt.Errorf("page %d has the type %#x", id, flags)
}

func (p *pages) branch(id uint64, count int, data []byte, keys keyRange) error {
	children, starts := make([]uint64, count), make([][]byte, count)
	for i := range count {
		at := pageHeader + i*element
		if at+element > len(data) {
			return fmt.Errorf("page %d has %d elements in %d bytes", id, count, len(data))
		}
		e := data[at:]
		key, err := cut(e, binary.NativeEndian.Uint32(e), binary.NativeEndian.Uint32(e[4:]))
		if err != nil || !keys.has(i, key) || i > 0 && bytes.Compare(starts[i-1], key) >= 0 {
			return fmt.Errorf("page %d, element %d: no key, or out of order", id, i)
		}
		children[i], starts[i] = binary.NativeEndian.Uint64(e[8:]), key
	}
	for i, child := range children {
		below := keyRange{from: starts[i], until: keys.until}
		if i+1 < count {
			below.until = starts[i+1]
		}
		if err := p.tree(child, below); err != nil {
			return err
		}
	}
	return nil
}

// leaf looks at a leaf page, or at the one inside a small bucket's value.
func (p *pages) leaf(id uint64, count int, data []byte, keys keyRange) error {
	var last []byte
	for i := range count {
		at := pageHeader + i*element
		if at+element > len(data) {
			return fmt.Errorf("page %d has %d elements in %d bytes", id, count, len(data))
		}
		e := data[at:]
		if kind := binary.NativeEndian.Uint32(e); kind > bucketElement {
			return fmt.Errorf("page %d, element %d: it has the type %#x", id, i, kind)
		}
		pos, ksize, vsize := binary.NativeEndian.Uint32(e[4:]), binary.NativeEndian.Uint32(e[8:]), binary.NativeEndian.Uint32(e[12:])
		key, err := cut(e, pos, ksize)
		if err != nil || !keys.has(i, key) || i > 0 && bytes.Compare(last, key) >= 0 {
			return fmt.Errorf("page %d, element %d: no key, or out of order", id, i)
		}
		last = key
		value, err := cut(e[int(pos)+len(key):], 0, vsize)
		if err != nil {
			return fmt.Errorf("page %d, element %d: %w", id, i, err)
		}
		if binary.NativeEndian.Uint32(e)&bucketElement == 0 {
			continue
		}
		if err := p.bucket(id, value); err != nil {
			return err
		}
	}
	return nil
}

func (p *pages) bucket(id uint64, value []byte) error {
	if len(value) < bucketHeader {
		return fmt.Errorf("page %d: a bucket of %d bytes", id, len(value))
	}
	if root := binary.NativeEndian.Uint64(value); root != 0 {
		return p.tree(root, keyRange{})
	}
	inline := value[bucketHeader:]
	if len(inline) < pageHeader || binary.NativeEndian.Uint16(inline[8:]) != leafPage {
		return fmt.Errorf("page %d: a bucket without a page", id)
	}
	return p.leaf(id, int(binary.NativeEndian.Uint16(inline[10:])), inline, keyRange{})
}

// cut returns size bytes from pos on.
func cut(b []byte, pos, size uint32) ([]byte, error) {
	if uint64(pos)+uint64(size) > uint64(len(b)) {
		return nil, fmt.Errorf("bytes %d to %d of %d", pos, uint64(pos)+uint64(size), len(b))
	}
	return b[pos : uint64(pos)+uint64(size)], nil
}
