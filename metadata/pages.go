package metadata

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"os"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
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

// maxPagesRead is how many pages (16 MiB of them) a database may have whose
// leaves are read when it is opened. Of a larger one only the branch pages are,
// about one in a hundred.
const maxPagesRead = 4096

// maxDepth is more than any tree has: a hundred children a page would make it
// larger than any disk.
const maxDepth = 16

// pageChecker reads the structure of one database file.
type pageChecker struct {
	file     *os.File
	pageSize uint64
	high     uint64 // pages from here on do not exist
	used     []uint64
	leaves   bool // leaves are read too
}

// checkPages looks at what makes a file walkable: its length, the free list,
// and the branch pages, each referred to once. It returns Corrupt (M2). Damage
// inside the leaves of a large database is found when they are read.
func checkPages(f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("database %s: %w: %w", f.Name(), err, errdefs.ErrUnavailable)
	}
	c := &pageChecker{file: f}
	if err := c.check(fi.Size()); err != nil {
		return &errdefs.Corrupt{Invariant: "M2", Object: "database " + f.Name(), Detail: err.Error()}
	}
	return nil
}

// meta is what is needed of a meta page.
type meta struct{ pageSize, root, freelist, high, txid uint64 }

func (c *pageChecker) check(size int64) error {
	m, err := c.newestMeta()
	if err != nil {
		return err
	}
	c.pageSize, c.high = m.pageSize, m.high
	// Compared as a quotient: the product of damaged numbers overflows.
	if have := uint64(size) / m.pageSize; have < m.high {
		return fmt.Errorf("the file has %d pages, its meta page says %d", have, m.high)
	}
	c.leaves = m.high <= maxPagesRead
	c.used = make([]uint64, m.high/64+1)
	if m.freelist != noFreelist {
		if err := c.checkFreelist(m.freelist); err != nil {
			return err
		}
	}
	return c.checkRoot(m.root)
}

// newestMeta chooses as bbolt does.
func (c *pageChecker) newestMeta() (meta, error) {
	var best meta
	found := false
	sizes := []uint64{uint64(os.Getpagesize())}
	if m, ok := c.readMeta(0); ok {
		best, found, sizes = m, true, []uint64{m.pageSize}
	}
	for _, s := range sizes {
		if m, ok := c.readMeta(s); ok && (!found || m.txid > best.txid) {
			best, found = m, true
		}
	}
	if !found {
		return meta{}, fmt.Errorf("neither meta page is valid")
	}
	return best, nil
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
	p, err := c.read(id, pageFreelist)
	if err != nil {
		return err
	}
	body, n := p.data[pageHeaderLen:], uint64(p.count)
	if p.count == 0xFFFF { // the true count comes first
		n, body = le64(body), body[8:]
	}
	if n > uint64(len(body))/8 {
		return fmt.Errorf("free list on page %d has %d entries in %d bytes", id, n, len(body))
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

// checkRoot walks the bucket of buckets, whose leaves say where the others
// begin, and then those.
func (c *pageChecker) checkRoot(root uint64) error {
	var roots []uint64
	collect := func(p page, i int) error {
		flags, _, value, err := leafElement(p, i)
		if err != nil || flags&bucketLeafFlag == 0 {
			return err
		}
		if len(value) < bucketHeaderLen {
			return fmt.Errorf("page %d: bucket header of %d bytes", p.id, len(value))
		}
		if r := le64(value); r != 0 { // 0: the bucket is inline
			roots = append(roots, r)
		}
		return nil
	}
	if err := c.walk(root, 0, -1, collect); err != nil {
		return err
	}
	for _, r := range roots {
		depth, err := c.depth(r)
		if err != nil {
			return err
		}
		if err := c.walk(r, 0, depth, nil); err != nil {
			return err
		}
	}
	return nil
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

// walk checks the pages at and below id. leafDepth is where the leaves are, or
// -1 to read every page; a leaf that is not read is only claimed.
func (c *pageChecker) walk(id uint64, depth, leafDepth int, each func(page, int) error) error {
	if depth >= maxDepth {
		return fmt.Errorf("page %d is more than %d deep", id, maxDepth)
	}
	if err := c.claim(id); err != nil {
		return err
	}
	want := uint16(pageBranch)
	if leafDepth < 0 {
		want = pageBranch | pageLeaf
	} else if depth >= leafDepth {
		if !c.leaves {
			return nil
		}
		want = pageLeaf
	}
	p, err := c.read(id, want)
	if err != nil {
		return err
	}
	return c.walkElements(p, depth, leafDepth, each)
}

// walkElements checks that keys lie in the page and in order, and goes on
// below a branch.
func (c *pageChecker) walkElements(p page, depth, leafDepth int, each func(page, int) error) error {
	if p.flags == pageBranch && depth+1 < leafDepth {
		c.prefetch(p)
	}
	var last []byte
	for i := range p.count {
		var key []byte
		var child uint64
		var err error
		if p.flags == pageLeaf {
			_, key, _, err = leafElement(p, i)
		} else {
			child, key, err = branchElement(p, i)
		}
		if err != nil {
			return err
		}
		if i > 0 && string(key) <= string(last) {
			return fmt.Errorf("page %d: keys are not in order at element %d", p.id, i)
		}
		last = key
		if p.flags == pageBranch {
			err = c.walk(child, depth+1, leafDepth, each)
		} else if each != nil {
			err = each(p, i)
		}
		if err != nil {
			return err
		}
	}
	if p.flags == pageBranch && p.count == 0 {
		return fmt.Errorf("branch page %d is empty", p.id)
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

func leafElement(p page, i int) (flags uint32, key, value []byte, err error) {
	at := pageHeaderLen + i*elementLen
	if at+elementLen > len(p.data) {
		return 0, nil, nil, fmt.Errorf("page %d has no room for its %d elements", p.id, p.count)
	}
	e := p.data[at:]
	flags, pos, klen, vlen := le32(e), le32(e[4:]), le32(e[8:]), le32(e[12:])
	if flags > bucketLeafFlag {
		return 0, nil, nil, fmt.Errorf("page %d: element %d has flags %#x", p.id, i, flags)
	}
	if key, err = cut(p, at, pos, klen); err != nil {
		return 0, nil, nil, err
	}
	// Added in 64 bits: both come from the disk.
	value, err = cutAt(p, uint64(at)+uint64(pos)+uint64(klen), vlen)
	return flags, key, value, err
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
