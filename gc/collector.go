package gc

import (
	"context"
	"errors"
	"sync"
	"time"

	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/internal/budget"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// Config is what a Collector stands on. All of it outlives the Collector.
type Config struct {
	Root    *durable.Root
	DB      *metadata.DB
	Journal *journal.Journal
	Blobs   *content.Store
	Limits  Limits
	// Background has what is due done from time to time: ages, leases that
	// expire, measures.
	Background bool
}

// Collector keeps one open store within its limits.
type Collector struct {
	Config
	space *budget.Budget
	disk  disk

	evicting chan struct{}   // capacity 1: held by whoever evicts
	kick     chan struct{}   // capacity 1
	ctx      context.Context // ends with Close
	stop     context.CancelFunc
	done     sync.WaitGroup

	mu   sync.Mutex // guards the rest
	hand hand
	uses map[string]int // cache mounts of steps that run
	// dropping are cache mounts on their way to the trash, measuring those that
	// are looked at after a step; closed when that is over.
	dropping, measuring map[string]chan struct{}
}

// New returns the collector of the store that c belongs to, and starts it. It
// ends with Close.
func New(c Config) *Collector {
	ctx, cancel := context.WithCancel(context.Background())
	g := &Collector{
		Config: c, disk: disk{root: c.Root}, evicting: make(chan struct{}, 1), kick: make(chan struct{}, 1), ctx: ctx, stop: cancel,
		uses: map[string]int{}, dropping: map[string]chan struct{}{}, measuring: map[string]chan struct{}{},
	}
	g.space = budget.New(rules{g})
	g.done.Go(func() { g.loop(ctx) })
	if c.Background {
		g.done.Go(func() { g.measureLoop(ctx) })
	}
	return g
}

// Close stops what is done in the background.
func (c *Collector) Close() {
	c.stop()
	c.done.Wait()
}

// Space is what everybody who writes to the store claims from.
func (c *Collector) Space() *budget.Budget { return c.space }

// Kick has the limits looked at: something was released, or has grown.
func (c *Collector) Kick() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// every is the time between two looks at what is due.
const every = time.Minute

func (c *Collector) loop(ctx context.Context) {
	var due <-chan time.Time // never, but in the background
	if c.Background {
		tick := time.NewTicker(every)
		defer tick.Stop()
		due = tick.C
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.kick:
			_ = c.Settle(ctx, c.Limits) // the next look tries again
		case <-due:
			_ = c.due(ctx)
		}
	}
}

func (c *Collector) measureLoop(ctx context.Context) {
	for {
		_, _ = c.Measure(ctx) // what could not be measured is tried again
		select {
		case <-ctx.Done():
			return
		case <-time.After(measureEvery):
		}
	}
}

// due does what time brings.
func (c *Collector) due(ctx context.Context) error {
	_, err := c.ExpireLeases(ctx, time.Now())
	return errors.Join(err, c.Settle(ctx, c.Limits))
}

// Settle brings the store within limits, as far as what is in use allows. It
// waits for the files of what it removed only where the disk has to have them
// back.
func (c *Collector) Settle(ctx context.Context, l Limits) error {
	end, err := c.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	now := time.Now()
	_, err = c.Blobs.DropUnfinished(ctx, now.Add(-l.downloads()))
	if l.Retain == RetainMinimal {
		_, berr := c.dropBlobs(ctx, everything)
		err = errors.Join(err, berr)
	}
	if l.CacheAge > 0 {
		_, _, aerr := c.evictFrom(ctx, hand{}, everything, now.Add(-l.CacheAge))
		err = errors.Join(err, aerr)
	}
	if over := c.cacheOver(l); over > 0 {
		_, cerr := c.shrinkCache(ctx, over)
		err = errors.Join(err, cerr)
	}
	err = errors.Join(err, c.compact(ctx))
	if short := c.short(l, 0, 0, 0); short > 0 {
		_, serr := c.makeRoom(ctx, l, short)
		err = errors.Join(err, serr)
	}
	return err
}

// compact has the change log written anew if it has grown far beyond what it
// tells of, and the database if much of it is free. What that takes meanwhile is
// claimed; with no room for it the database stays as it is. Room is not made: the
// caller has begun.
func (c *Collector) compact(ctx context.Context) error {
	if c.DB.LogWorthCompacting() {
		if err := later(c.DB.CompactLog(ctx)); err != nil {
			return err
		}
	}
	live, worth, err := c.DB.WorthCompacting()
	if err != nil || !worth {
		return err
	}
	claim := c.space.Claim("compact the database")
	defer claim.Release()
	if !claim.Try(live) {
		return nil
	}
	return later(c.DB.Compact(ctx))
}

// later drops the errors of what is tried again at the next look.
func later(err error) error {
	if errors.Is(err, errdefs.ErrResourceExhausted) || errors.Is(err, errdefs.ErrUnavailable) {
		return nil
	}
	return err
}

// TrimCache brings the build cache within its limit, and the disk has it back:
// for a build that has stored something.
func (c *Collector) TrimCache(ctx context.Context) error {
	over := c.cacheOver(c.Limits)
	if over <= 0 {
		return nil
	}
	end, err := c.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	freed, err := c.shrinkCache(ctx, c.cacheOver(c.Limits))
	if err != nil || freed == 0 {
		return err
	}
	defer c.Journal.Hurry()()
	return c.Journal.Drain(ctx)
}

// everything is more bytes than there are.
const everything = 1 << 62

// begin waits until nobody else evicts.
func (c *Collector) begin(ctx context.Context) (end func(), err error) {
	select {
	case c.evicting <- struct{}{}:
		return func() { <-c.evicting }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// ExpireLeases ends the leases whose time is up, and returns how many.
func (c *Collector) ExpireLeases(ctx context.Context, now time.Time) (int, error) {
	n, err := c.DB.EndLeases(ctx, func(l layout.LeaseRecord) bool { return !l.Expires.IsZero() && now.After(l.Expires) })
	if n > 0 {
		c.Journal.Kick()
	}
	return n, err
}
