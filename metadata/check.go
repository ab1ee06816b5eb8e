package metadata

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// maxPagesRead is how many pages (16 MiB of them) a database may have that is
// read in full when it is opened. Of a larger one only the branch pages are,
// about one in a hundred.
const maxPagesRead = 4096

// checkPages looks at a file that nobody has mapped: its length, the free
// list, the branch pages, each referred to once, and in a small database, or if
// all is asked for, every entry. It returns Corrupt (M1, M2, M5). Damage inside
// the leaves of a large database is found when they are read, or by [DB.watch].
func checkPages(f *os.File, all bool) error {
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("database %s: %w: %w", f.Name(), err, errdefs.ErrUnavailable)
	}
	c := &pageChecker{file: f}
	return damaged(f.Name(), c.check(fi.Size(), all))
}

// damaged gives what a check found its kind.
func damaged(name string, err error) error {
	if err == nil || errdefs.Has(err) {
		return err
	}
	return &errdefs.Corrupt{Invariant: "M2", Object: "database " + name, Detail: err.Error()}
}

func (c *pageChecker) check(size int64, all bool) error {
	m, err := c.newestMeta()
	if err != nil {
		return err
	}
	// Compared as a quotient: the product of damaged numbers overflows.
	if have := uint64(size) / m.pageSize; have < m.high {
		return fmt.Errorf("the file has %d pages, its meta page says %d", have, m.high)
	}
	c.pageSize, c.leaves = m.pageSize, all || m.high <= maxPagesRead
	c.setHigh(m.high)
	if m.freelist != noFreelist {
		if err := c.checkFreelist(m.freelist); err != nil {
			return err
		}
	}
	return c.checkRoot(m.root)
}

func (c *pageChecker) setHigh(high uint64) { c.high, c.used = high, make([]uint64, high/64+1) }

// bucketSum is a bucket as the bucket of buckets tells of it, and what its
// entries add up to.
type bucketSum struct {
	name      string
	root      uint64 // 0: the bucket is inline
	inline    []byte // its page then
	says, has uint64
}

// checkRoot walks the bucket of buckets, whose leaves say where the others
// begin, and then those.
func (c *pageChecker) checkRoot(root uint64) error {
	var buckets []bucketSum
	err := c.walk(root, place{}, -1, func(e entry) error {
		if !e.bucket || len(e.value) < bucketHeaderLen {
			return fmt.Errorf("%q is no bucket", e.key)
		}
		buckets = append(buckets, bucketSum{
			name: string(e.key), root: le64(e.value), says: le64(e.value[8:]), inline: e.value[bucketHeaderLen:],
		})
		return nil
	})
	format := 0
	for i := range buckets {
		if err == nil {
			err = c.checkBucket(&buckets[i], &format)
		}
	}
	if err != nil || !c.leaves {
		return err
	}
	return compareSums(buckets, format)
}

func compareSums(buckets []bucketSum, format int) error {
	if format == 0 {
		return errors.New("it has no store record")
	}
	if format == formatWithoutSums || format > layout.FormatVersion {
		return nil
	}
	there := map[string]bool{}
	for _, b := range buckets {
		there[b.name] = true
		if b.says != b.has {
			return &errdefs.Corrupt{Invariant: "M5", Object: "bucket " + b.name, Detail: fmt.Sprintf("its entries add up to %016x, not %016x", b.has, b.says)}
		}
	}
	for _, name := range layout.Buckets() {
		if !there[name] && (format > formatWithoutAccounts || !slices.Contains(addedWithAccounts, name)) {
			return fmt.Errorf("bucket %s is missing", name)
		}
	}
	return nil
}

var keysOnly = layout.KeysOnly()

// checkBucket adds a bucket's entries up, and compares values with their
// checksums. It sets the format if it comes upon the store's record.
func (c *pageChecker) checkBucket(b *bucketSum, format *int) error {
	each := func(e entry) error {
		if e.bucket {
			return fmt.Errorf("bucket %s: %q is a bucket", b.name, e.key)
		}
		b.has += layout.EntrySum(e.key, e.value)
		if slices.Contains(keysOnly, b.name) {
			return nil
		}
		if b.name == layout.BucketMeta && string(e.key) == layout.MetaKey {
			var rec layout.MetaRecord
			err := layout.Decode(b.name, string(e.key), e.value, &rec)
			*format = rec.Format
			return err
		}
		return layout.CheckSum(b.name, string(e.key), e.value)
	}
	if b.root == 0 {
		if len(b.inline) < pageHeaderLen || le16(b.inline[8:]) != pageLeaf {
			return fmt.Errorf("bucket %s has no page", b.name)
		}
		p := page{flags: pageLeaf, count: int(le16(b.inline[10:])), data: b.inline}
		return p.entries(place{}, each)
	}
	depth, err := c.depth(b.root)
	if err != nil {
		return err
	}
	return c.walk(b.root, place{}, depth, each)
}
