package gc

import (
	"context"
	"errors"
	"time"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// CachePrune says what of the build cache is to go.
type CachePrune struct {
	// Before spares what was used after it; zero: nothing is spared.
	Before time.Time
	// Keep is how many bytes stay.
	Keep int64
	// Held removes, if nothing is to stay, results that an image or a container
	// has too: no space is freed by it, but their steps are run again.
	Held bool
	// Progress is told of what has gone so far; may be nil.
	Progress func(records int, bytes int64)
}

// PrunedCache is what went of the build cache.
type PrunedCache struct {
	Records, Mounts int
	Bytes           int64
}

// PruneCache removes build results and cache mounts that nobody uses, in many
// short transactions: builds go on meanwhile, and ctx ends it between two.
func (c *Collector) PruneCache(ctx context.Context, p CachePrune) (out PrunedCache, err error) {
	if p.Held && p.Keep == 0 {
		n, err := c.dropHeld(ctx, p.Before)
		out.Records += n
		if err != nil {
			return out, err
		}
	}
	at := hand{}
	for round := 0; round < 2; {
		want := c.toPrune(p)
		if want <= 0 {
			return out, nil
		}
		var n evicted
		n, at, err = c.evictFrom(ctx, at, min(want, pruneStep), p.Before)
		out.Records += n.records
		out.Bytes += n.bytes
		if err != nil {
			return out, err
		}
		if p.Progress != nil {
			p.Progress(out.Records, out.Bytes)
		}
		if at == (hand{}) {
			round++ // what results that went have stood on
		}
	}
	var bytes int64
	out.Mounts, bytes, err = c.dropMounts(ctx, c.toPrune(p), p.Before)
	out.Bytes += bytes
	return out, err
}

// toPrune is how many bytes are to go still.
func (c *Collector) toPrune(p CachePrune) int64 {
	if p.Keep == 0 {
		return everything // what takes no space goes as well
	}
	return c.cacheBytes() - p.Keep
}

// pruneStep is how many bytes go between two reports.
const pruneStep = 64 << 20

// dropHeld drops the rows of results that no build holds, whoever else does.
func (c *Collector) dropHeld(ctx context.Context, before time.Time) (n int, err error) {
	for at, end := (hand{}), false; !end && err == nil; {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		var keys []string
		err = c.DB.View(ctx, func(tx *metadata.Tx) error {
			end = true
			tx.EachCacheByUse(at.key, at.last, func(key string, last time.Time) bool {
				if !before.IsZero() && !last.Before(before) {
					return false
				}
				if len(keys) == window {
					end = false
					return false
				}
				at = hand{key, last}
				keys = append(keys, key)
				return true
			})
			return nil
		})
		if err == nil && len(keys) > 0 {
			err = c.DB.Update(ctx, func(tx *metadata.Tx) error {
				for _, key := range keys {
					free, err := unleased(tx, key)
					if err == nil && free {
						err = tx.Drop(layout.CacheNode(key))
						n++
					}
					if err != nil {
						return err
					}
				}
				return nil
			})
		}
	}
	return n, err
}

// unleased tells whether a row is that of a result, and no lease holds it.
func unleased(tx *metadata.Tx, key string) (bool, error) {
	rec, err := tx.Cache().Get(key)
	if errors.Is(err, errdefs.ErrNotFound) || err == nil && len(rec.Snapshots) == 0 {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, s := range rec.Snapshots {
		if s == "" {
			continue
		}
		parents, err := tx.Parents(layout.SnapshotNode(s))
		if err != nil {
			return false, err
		}
		for _, e := range parents {
			if kind, _ := e.Parent.Split(); kind == layout.KindLease {
				return false, nil
			}
		}
	}
	return true, nil
}
