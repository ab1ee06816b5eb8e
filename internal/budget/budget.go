// Package budget hands out bytes of something that is bounded: the disk space of
// a store.
//
// Whoever is about to write claims what it writes, before. What is claimed
// counts until it is released, which is when it is recorded or gone. A budget
// that is asked for more than there is has something freed, or refuses.
//
// Owns nothing on disk. Concurrency: all methods may be called by many
// goroutines; no lock is held while space is freed. A nil *Budget has no bounds.
package budget

import (
	"context"
	"fmt"
	"sync"

	"varve.dev/errdefs"
)

// Rules say how much there is.
type Rules interface {
	// Short returns by how many bytes there is too little for extra more, on
	// top of claimed, of which written are on the disk already; at most 0 if
	// there is enough. It is called often, and under the budget's lock.
	Short(claimed, written, extra int64) int64
	// Free makes room for at least so many bytes, or for some, and returns
	// nil if it is worth trying again. The error says why there is no room; one
	// without a kind becomes ErrResourceExhausted.
	Free(ctx context.Context, short int64) error
}

// Budget is shared by everybody who writes.
type Budget struct {
	rules Rules

	mu      sync.Mutex // guards the rest, and the claims
	claimed int64
	written int64
}

// New returns a budget by these rules.
func New(rules Rules) *Budget { return &Budget{rules: rules} }

// Claimed returns what is on its way: so many bytes are promised, and so many
// of them written.
func (b *Budget) Claimed() (claimed, written int64) {
	if b == nil {
		return 0, 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.claimed, b.written
}

// Claim is what one writer was given. It ends with Release.
type Claim struct {
	budget  *Budget
	purpose string
	granted int64
	written int64
}

// Claim begins a claim of nothing. purpose is for errors: "pull debian:12".
func (b *Budget) Claim(purpose string) *Claim {
	if b == nil {
		return nil
	}
	return &Claim{budget: b, purpose: purpose}
}

// Reserve sets bytes aside that are not written yet. Errors:
// ErrResourceExhausted, with nothing set aside; the end of ctx.
func (c *Claim) Reserve(ctx context.Context, bytes int64) error {
	if c == nil || bytes <= 0 {
		return nil
	}
	return c.get(ctx, bytes)
}

// Try sets bytes aside if there is room for them as it is: nothing is freed, and
// nobody is waited for. It is for whoever may be freeing.
func (c *Claim) Try(bytes int64) bool {
	return c == nil || c.grant(bytes) <= 0
}

// grant sets bytes aside, or tells how many are too many.
func (c *Claim) grant(bytes int64) (short int64) {
	b := c.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	if short = b.rules.Short(b.claimed, b.written, bytes); short <= 0 {
		b.claimed += bytes
		c.granted += bytes
	}
	return short
}

// step is what a claim gets at least when it needs more: asking costs.
const step = 1 << 20

// Write says that bytes are about to be written. They come from what was set
// aside by this claim or by the operation that ctx belongs to (see [Of]), and
// else are asked for. Errors as Reserve's.
func (c *Claim) Write(ctx context.Context, bytes int64) error {
	if c == nil || bytes <= 0 {
		return nil
	}
	if missing := c.take(ctx, bytes); missing > 0 {
		err := c.get(ctx, max(missing, step))
		if err != nil && missing < step { // near the end every byte counts
			err = c.get(ctx, missing)
		}
		if err != nil {
			return err
		}
		c.take(ctx, bytes)
	}
	return nil
}

// take writes out of what was granted, or tells how much is missing.
func (c *Claim) take(ctx context.Context, bytes int64) (missing int64) {
	b := c.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	missing = c.written + bytes - c.granted
	if of, _ := ctx.Value(operation{}).(*Claim); missing > 0 && of != nil && of != c && of.budget == b {
		spare := min(of.granted-of.written, missing)
		of.granted -= spare
		c.granted += spare
		missing -= spare
	}
	if missing <= 0 {
		c.written += bytes
		b.written += bytes
	}
	return missing
}

// get is granted more.
func (c *Claim) get(ctx context.Context, bytes int64) error {
	for {
		short := c.grant(bytes)
		if short <= 0 {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := c.budget.rules.Free(ctx, short); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if !errdefs.Has(err) { // of a kind of its own, the disk's failure for one
				err = fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
			}
			return fmt.Errorf("%s: %w", c.purpose, err)
		}
	}
}

// Unwrite says that bytes that were written are gone again.
func (c *Claim) Unwrite(bytes int64) {
	if c == nil {
		return
	}
	c.budget.mu.Lock()
	defer c.budget.mu.Unlock()
	bytes = min(bytes, c.written)
	c.written -= bytes
	c.budget.written -= bytes
}

// Release ends the claim: what it wrote is recorded by now, or gone. It may be
// called again.
func (c *Claim) Release() {
	if c == nil {
		return
	}
	c.budget.mu.Lock()
	defer c.budget.mu.Unlock()
	c.budget.claimed -= c.granted
	c.budget.written -= c.written
	c.granted, c.written = 0, 0
}

type operation struct{}

// Of returns a context in which others' writes come out of what c has set aside,
// as long as there is any.
func Of(ctx context.Context, c *Claim) context.Context {
	if c == nil {
		return ctx
	}
	return context.WithValue(ctx, operation{}, c)
}
