package gc

import (
	"context"
	"time"
)

// CachePrune says what of the build cache is to go.
type CachePrune struct {
	// Before spares what was used after it; zero: nothing is spared.
	Before time.Time
	// Keep is how many bytes stay.
	Keep int64
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
