package gc

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// evicted is what went.
type evicted struct {
	records int
	bytes   int64 // of layers and blobs, whose files are in the trash now
}

// hand is where the last eviction for want of space ended: like the hand of a
// clock it goes on from there, so that results that cannot go are not passed
// again and again.
type hand struct {
	key  string
	last time.Time
}

// window is how many of the least recently used results that can go are weighed
// against each other.
const window = 64

// cacheBytes is what is there for the build cache alone, or still on its way to
// an image.
func (c *Collector) cacheBytes() int64 {
	all := c.DB.Accounts()
	return all[layout.AccountSpareBlobs].Bytes + all[layout.AccountSpareLayers].Bytes + all[layout.AccountDir+layout.CacheMountDir].Bytes
}

// cacheOver is by how much the build cache is over its limit.
func (c *Collector) cacheOver(l Limits) int64 {
	if l.Cache <= 0 {
		return -everything
	}
	return c.cacheBytes() - l.Cache
}

// shrinkCache evicts build results until so many bytes are free, or none is left
// that can go: twice around the clock, because what one result stood on may have
// been passed before it went.
func (c *Collector) shrinkCache(ctx context.Context, bytes int64) (int64, error) {
	c.mu.Lock()
	from := c.hand
	c.mu.Unlock()
	first, at, err := c.evictFrom(ctx, from, bytes, time.Time{})
	if err == nil && first.bytes < bytes {
		var again evicted
		again, at, err = c.evictFrom(ctx, hand{}, bytes-first.bytes, time.Time{})
		first.bytes += again.bytes
	}
	c.mu.Lock()
	c.hand = at
	c.mu.Unlock()
	if err != nil || first.bytes >= bytes {
		return first.bytes, err
	}
	_, mounts, err := c.dropMounts(ctx, bytes-first.bytes, time.Time{})
	return first.bytes + mounts, err
}

// evictFrom evicts build results from the hand on, the least recently used first,
// until so many bytes are free or none is left; before spares those that were used
// after it, zero none. It returns where it ended: at the beginning, if none is left.
func (c *Collector) evictFrom(ctx context.Context, at hand, bytes int64, before time.Time) (out evicted, _ hand, err error) {
	defer c.Journal.Kick()
	for out.bytes < bytes {
		var results []candidate
		var end bool
		err := c.DB.View(ctx, func(tx *metadata.Tx) (err error) {
			results, at, end, err = candidates(tx, at, before)
			return err
		})
		if err != nil {
			return out, at, err
		}
		if len(results) > 0 {
			n, err := c.drop(ctx, results, bytes-out.bytes)
			if err != nil {
				return out, at, err
			}
			out.records += n.records
			out.bytes += n.bytes
		}
		if end {
			return out, hand{}, nil
		}
	}
	return out, at, nil
}

// candidate is a result that can go.
type candidate struct {
	key string
	rec layout.CacheRecord
}

// candidates collects the next window of results that can go. It looks at a
// bounded number of those that cannot: the view it runs in ends soon.
func candidates(tx *metadata.Tx, at hand, before time.Time) (out []candidate, _ hand, end bool, err error) {
	end = true
	looked := 0
	tx.EachCacheByUse(at.key, at.last, func(key string, last time.Time) bool {
		if !before.IsZero() && !last.Before(before) {
			return false
		}
		if looked++; len(out) == window || looked > 100*window {
			end = false
			return false
		}
		at = hand{key, last}
		var c candidate
		var ok bool
		if c, ok, err = look(tx, key); ok {
			out = append(out, c)
		}
		return err == nil
	})
	// What frees most for the least work lost goes first.
	slices.SortStableFunc(out, func(a, b candidate) int { return cmp.Compare(a.worth(), b.worth()) })
	return out, at, end, err
}

// worth is the work that is lost for each MiB.
func (c candidate) worth() float64 {
	return c.rec.Took.Seconds() / (float64(c.rec.Size)/(1<<20) + 1)
}

// look tells whether a result can go: nothing but the cache holds what it leads
// to. One that another stands on is not evicted before that, for it would free
// nothing; one that leads to nothing any more can always go.
func look(tx *metadata.Tx, key string) (candidate, bool, error) {
	rec, err := tx.Cache().Get(key)
	if errors.Is(err, errdefs.ErrNotFound) {
		return candidate{}, false, nil // K1: fsck reports it
	}
	if err != nil {
		return candidate{}, false, err
	}
	if rec.Alias != "" && tx.Cache().Has(rec.Alias) {
		return candidate{}, false, nil
	}
	for _, s := range rec.Snapshots {
		if s != "" && !tx.HeldOnlyBy(layout.SnapshotNode(s), layout.KindCache) {
			return candidate{}, false, nil
		}
	}
	return candidate{key, rec}, true, nil
}

// maxDrop bounds the results of one transaction.
const maxDrop = 4 * window

// drop removes candidates, and what they alone stood on and is no younger than
// the youngest of them, until so many bytes are free.
func (c *Collector) drop(ctx context.Context, candidates []candidate, bytes int64) (out evicted, err error) {
	var youngest time.Time
	for _, cand := range candidates {
		if cand.rec.LastUse.After(youngest) {
			youngest = cand.rec.LastUse
		}
	}
	err = c.DB.Update(ctx, func(tx *metadata.Tx) error {
		out = evicted{}
		todo := slices.Clone(candidates)
		for len(todo) > 0 && out.bytes < bytes && out.records < maxDrop {
			next := todo[0]
			todo = todo[1:]
			// It may have been used, or held, since it was looked at.
			now, ok, err := look(tx, next.key)
			if err != nil {
				return err
			}
			if !ok || now.rec.LastUse.After(next.rec.LastUse) {
				continue
			}
			below, err := below(tx, now.rec)
			if err != nil {
				return err
			}
			freed, err := freeing(tx, func() error { return tx.Drop(layout.CacheNode(next.key)) })
			if err != nil {
				return err
			}
			out.records++
			out.bytes += freed
			for _, key := range below {
				b, ok, err := look(tx, key)
				if err != nil {
					return err
				}
				if ok && !b.rec.LastUse.After(youngest) {
					todo = append([]candidate{b}, todo...)
				}
			}
		}
		return nil
	})
	return out, err
}

// freeing returns how many bytes go to the trash by what fn removes.
func freeing(tx *metadata.Tx, fn func() error) (int64, error) {
	before, err := tx.Accounts()
	if err != nil {
		return 0, err
	}
	was := before[layout.AccountTrash].Bytes
	if err := fn(); err != nil {
		return 0, err
	}
	after, err := tx.Accounts()
	return after[layout.AccountTrash].Bytes - was, err
}

// below returns the results that are what a result's snapshots stand on.
func below(tx *metadata.Tx, rec layout.CacheRecord) (keys []string, err error) {
	for _, s := range rec.Snapshots {
		if s == "" {
			continue
		}
		snap, err := tx.Snapshots().Get(s)
		if errors.Is(err, errdefs.ErrNotFound) || err == nil && snap.Parent == "" {
			continue
		}
		if err != nil {
			return nil, err
		}
		holders, err := tx.ParentsBy(layout.SnapshotNode(snap.Parent), layout.RelResult)
		if err != nil {
			return nil, err
		}
		for _, h := range holders {
			_, key := h.Parent.Split()
			keys = append(keys, key)
		}
	}
	return keys, nil
}
