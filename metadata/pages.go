package metadata

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"os"

	"golang.org/x/sys/unix"
)

// The page format of bbolt 1.x (internal/common/page.go, meta.go). It is read
// here, with plain reads, before bbolt maps the file: a branch page that leads
// back to itself makes bbolt recurse until the stack ends, and a free list
// with a wrong count makes it ask for all of memory. Both end the process, and
// no recover helps.
const (
	pageHeaderLen = 16
	elementLen    = 16
	metaMagic     = 0xED0CDAED
	metaLen       = 64

	pageBranch   = 0x01
	pageLeaf     = 0x02
	pageFreelist = 0x10

	bucketLeafFlag  = 0x01
	bucketHeaderLen = 16
	noFreelist      = ^uint64(0)
)

// maxDepth is more than any tree has: a hundred children a page would make it
// larger than any disk.
const maxDepth = 16

// pageChecker reads the structure of one database file.
type pageChecker struct {
	file     *os.File
	pageSize uint64
	high     uint64 // pages from here on do not exist
	used     []uint64
	leaves   bool                  // leaves are read too
	pace     func(bytes int) error // told of what is read; may be nil
}

// meta is what is needed of a meta page.
type meta struct{ pageSize, root, freelist, high, txid uint64 }

// newestMeta returns the newer meta page. bbolt makes do with one that is
// valid; but the other may be the newer one, and with it a commit is gone. A
// power cut does not leave such a page: what counts of it is in one sector.
func (c *pageChecker) newestMeta() (meta, error) {
	first, ok := c.readMeta(0)
	if !ok {
		return meta{}, errors.New("meta page 0 is not valid")
	}
	second, ok := c.readMeta(first.pageSize)
	if !ok {
		return meta{}, errors.New("meta page 1 is not valid")
	}
	if second.txid > first.txid {
		return second, nil
	}
	return first, nil
}

func (c *pageChecker) readMeta(off uint64) (meta, bool) {
	buf := make([]byte, metaLen)
	if _, err := c.file.ReadAt(buf, int64(off)+pageHeaderLen); err != nil {
		return meta{}, false
	}
	h := fnv.New64a()
	h.Write(buf[:56])
	if le32(buf) != metaMagic || le64(buf[56:]) != h.Sum64() {
		return meta{}, false
	}
	m := meta{pageSize: uint64(le32(buf[8:])), root: le64(buf[16:]), freelist: le64(buf[32:]), high: le64(buf[40:]), txid: le64(buf[48:])}
	return m, m.pageSize >= 512 && m.pageSize <= 1<<16
}

// page is one page with its overflow.
type page struct {
	id    uint64
	flags uint16
	count int
	data  []byte // header included
}

// read reads a page of one of the types in flags, and claims it.
func (c *pageChecker) read(id uint64, flags uint16) (page, error) {
	if id < 2 || id >= c.high {
		return page{}, fmt.Errorf("page %d is referred to, there are pages 2 to %d", id, c.high-1)
	}
	buf := make([]byte, c.pageSize)
	if _, err := c.file.ReadAt(buf, int64(id*c.pageSize)); err != nil {
		return page{}, fmt.Errorf("page %d: %w", id, err)
	}
	if c.pace != nil {
		if err := c.pace(len(buf)); err != nil {
			return page{}, err
		}
	}
	p := page{id: id, flags: le16(buf[8:]), count: int(le16(buf[10:]))}
	overflow := uint64(le32(buf[12:]))
	if got := le64(buf); got != id {
		return page{}, fmt.Errorf("page %d calls itself %d", id, got)
	}
	if p.flags&flags != p.flags || p.flags&(p.flags-1) != 0 || p.flags == 0 {
		return page{}, fmt.Errorf("page %d has type %#x", id, p.flags)
	}
	if overflow >= c.high-id {
		return page{}, fmt.Errorf("page %d overflows into %d more, there are pages up to %d", id, overflow, c.high-1)
	}
	if overflow > 0 {
		rest := make([]byte, overflow*c.pageSize)
		if _, err := c.file.ReadAt(rest, int64((id+1)*c.pageSize)); err != nil {
			return page{}, fmt.Errorf("page %d: %w", id, err)
		}
		buf = append(buf, rest...)
	}
	p.data = buf
	for i := uint64(1); i <= overflow; i++ {
		if err := c.claim(id + i); err != nil {
			return page{}, err
		}
	}
	return p, nil
}

// claim marks a page as used. Each has one use.
func (c *pageChecker) claim(id uint64) error {
	if id < 2 || id >= c.high {
		return fmt.Errorf("page %d is referred to, there are pages 2 to %d", id, c.high-1)
	}
	word, bit := id/64, uint64(1)<<(id%64)
	if c.used[word]&bit != 0 {
		return fmt.Errorf("page %d is used twice, or used and free", id)
	}
	c.used[word] |= bit
	return nil
}

func (c *pageChecker) checkFreelist(id uint64) error {
	if err := c.claim(id); err != nil {
		return err
	}
	body, n, err := c.readFreelist(id)
	if err != nil {
		return err
	}
	last := uint64(0)
	for i := range n {
		free := le64(body[i*8:])
		if free <= last {
			return fmt.Errorf("free list on page %d is not in order", id)
		}
		last = free
		if err := c.claim(free); err != nil {
			return fmt.Errorf("free list: %w", err)
		}
	}
	return nil
}

// readFreelist returns the entries of a free list, 8 bytes each, and how many
// there are.
func (c *pageChecker) readFreelist(id uint64) (body []byte, n uint64, err error) {
	p, err := c.read(id, pageFreelist)
	if err != nil {
		return nil, 0, err
	}
	body, n = p.data[pageHeaderLen:], uint64(p.count)
	if p.count == 0xFFFF { // the true count comes first
		n, body = le64(body), body[8:]
	}
	if n > uint64(len(body))/8 {
		return nil, 0, fmt.Errorf("free list on page %d has %d entries in %d bytes", id, n, len(body))
	}
	return body, n, nil
}

// depth is the number of branch pages above each leaf of the tree; all leaves
// of a tree are equally deep.
func (c *pageChecker) depth(id uint64) (int, error) {
	for depth := range maxDepth {
		var head [pageHeaderLen + elementLen]byte
		if id < 2 || id >= c.high {
			return 0, fmt.Errorf("page %d is referred to, there are pages 2 to %d", id, c.high-1)
		}
		if _, err := c.file.ReadAt(head[:], int64(id*c.pageSize)); err != nil {
			return 0, fmt.Errorf("page %d: %w", id, err)
		}
		if le16(head[8:]) != pageBranch {
			return depth, nil
		}
		id = le64(head[pageHeaderLen+8:])
	}
	return 0, fmt.Errorf("page %d is more than %d deep", id, maxDepth)
}

// place is where in a tree a page stands: how deep, and what keys it has. A
// page's first key is the one that its parent has of it: bbolt finds a page in
// its parent by that when it writes it, and writes a second one if it does not.
type place struct {
	depth        int
	first, until []byte // nil: any
}

// holds tells whether a key may come behind another on this page; nil: behind
// none.
func (at place) holds(last, key []byte) bool {
	if last == nil && at.first != nil && string(key) != string(at.first) || last != nil && string(key) <= string(last) {
		return false
	}
	return at.until == nil || string(key) < string(at.until)
}

// walk checks the pages at and below id. leafDepth is where the leaves are, or
// -1 to read every page; a leaf that is not read is only claimed. each is told
// of every entry of the leaves.
func (c *pageChecker) walk(id uint64, at place, leafDepth int, each func(entry) error) error {
	if at.depth >= maxDepth {
		return fmt.Errorf("page %d is more than %d deep", id, maxDepth)
	}
	if err := c.claim(id); err != nil {
		return err
	}
	want := uint16(pageBranch)
	if leafDepth < 0 {
		want = pageBranch | pageLeaf
	} else if at.depth >= leafDepth {
		if !c.leaves {
			return nil
		}
		want = pageLeaf
	}
	p, err := c.read(id, want)
	if err != nil {
		return err
	}
	if p.flags == pageLeaf {
		return p.entries(at, each)
	}
	return c.branch(p, at, leafDepth, each)
}

// branch checks a branch page's keys and goes on below it.
func (c *pageChecker) branch(p page, at place, leafDepth int, each func(entry) error) error {
	if c.leaves || at.depth+1 < leafDepth {
		c.prefetch(p)
	}
	if p.count == 0 {
		return fmt.Errorf("branch page %d is empty", p.id)
	}
	var last []byte
	for i := range p.count {
		child, key, err := branchElement(p, i)
		below := place{depth: at.depth + 1, first: key, until: at.until}
		if err == nil && i+1 < p.count {
			_, below.until, err = branchElement(p, i+1)
		}
		if err == nil && !at.holds(last, key) {
			err = fmt.Errorf("branch page %d: keys are not in order at element %d", p.id, i)
		}
		last = key
		if err == nil {
			err = c.walk(child, below, leafDepth, each)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// entries checks that the keys of a leaf lie in the page, in order and where
// they are looked for.
func (p page) entries(at place, each func(entry) error) error {
	var last []byte
	for i := range p.count {
		e, err := leafElement(p, i)
		if err != nil {
			return err
		}
		if !at.holds(last, e.key) {
			return fmt.Errorf("page %d: keys are not in order at element %d", p.id, i)
		}
		last = e.key
		if err := each(e); err != nil {
			return fmt.Errorf("page %d: %w", p.id, err)
		}
	}
	return nil
}

// prefetch has the kernel read the children of a branch at once: one after the
// other they take three times as long from a cold disk. It is a hint.
func (c *pageChecker) prefetch(p page) {
	for i := range p.count {
		child, _, err := branchElement(p, i)
		if err != nil || child >= c.high {
			return
		}
		_ = unix.Fadvise(int(c.file.Fd()), int64(child*c.pageSize), int64(c.pageSize), unix.FADV_WILLNEED)
	}
}

func branchElement(p page, i int) (child uint64, key []byte, err error) {
	at := pageHeaderLen + i*elementLen
	if at+elementLen > len(p.data) {
		return 0, nil, fmt.Errorf("page %d has no room for its %d elements", p.id, p.count)
	}
	e := p.data[at:]
	key, err = cut(p, at, le32(e), le32(e[4:]))
	return le64(e[8:]), key, err
}

// entry is one element of a leaf.
type entry struct {
	bucket     bool // value is a bucket's header, and its page if it is inline
	key, value []byte
}

func leafElement(p page, i int) (entry, error) {
	at := pageHeaderLen + i*elementLen
	if at+elementLen > len(p.data) {
		return entry{}, fmt.Errorf("page %d has no room for its %d elements", p.id, p.count)
	}
	e := p.data[at:]
	flags, pos, klen, vlen := le32(e), le32(e[4:]), le32(e[8:]), le32(e[12:])
	if flags > bucketLeafFlag {
		return entry{}, fmt.Errorf("page %d: element %d has flags %#x", p.id, i, flags)
	}
	key, err := cut(p, at, pos, klen)
	if err != nil {
		return entry{}, err
	}
	// Added in 64 bits: both come from the disk.
	value, err := cutAt(p, uint64(at)+uint64(pos)+uint64(klen), vlen)
	return entry{bucket: flags == bucketLeafFlag, key: key, value: value}, err
}

func cut(p page, at int, pos, n uint32) ([]byte, error) {
	return cutAt(p, uint64(at)+uint64(pos), n)
}

func cutAt(p page, from uint64, n uint32) ([]byte, error) {
	if from+uint64(n) > uint64(len(p.data)) {
		return nil, fmt.Errorf("page %d: an element ends at byte %d of %d", p.id, from+uint64(n), len(p.data))
	}
	return p.data[from : from+uint64(n)], nil
}

func le16(b []byte) uint16 { return binary.LittleEndian.Uint16(b) }
func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }
