package gc

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"time"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// Cache mounts are directories that steps of builds write to. They have no
// records: what they take is measured, and when they were used is the time of
// their directory.

// UseMount keeps a cache mount, which need not be there yet, until end is called.
// One that is being dropped is waited for: its name is free then.
func (c *Collector) UseMount(ctx context.Context, key string) (end func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.dropping[key] != nil {
		gone := c.dropping[key]
		c.mu.Unlock()
		select {
		case <-gone:
		case <-ctx.Done():
		}
		c.mu.Lock()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	c.uses[key]++
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.uses[key]--; c.uses[key] == 0 {
			delete(c.uses, key)
			c.measureMount(key)
		}
	}, nil
}

// measureMount has a cache mount measured after a step: what it has written
// counts from here on. The caller holds mu.
func (c *Collector) measureMount(key string) {
	if c.measuring[key] != nil {
		return
	}
	over := make(chan struct{})
	c.measuring[key] = over
	c.done.Go(func() {
		_ = c.measureOne(c.ctx, layout.CacheMountPath(key), "")
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.measuring, key)
		close(over)
	})
}

// unused keeps a cache mount from being used until end is called, if nobody uses
// it.
func (c *Collector) unused(ctx context.Context, key string) (end func(), ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for over := c.measuring[key]; over != nil && ctx.Err() == nil; over = c.measuring[key] {
		c.mu.Unlock()
		select {
		case <-over:
		case <-ctx.Done():
		}
		c.mu.Lock()
	}
	if c.uses[key] > 0 || c.dropping[key] != nil {
		return nil, false
	}
	gone := make(chan struct{})
	c.dropping[key] = gone
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.dropping, key)
		close(gone)
	}, true
}

// dropMounts removes cache mounts that no step uses, the longest unused first,
// until so many bytes are free. before spares those used after it.
func (c *Collector) dropMounts(ctx context.Context, bytes int64, before time.Time) (n int, freed int64, err error) {
	type mount struct {
		key  string
		used time.Time
	}
	var all []mount
	entries, err := os.ReadDir(c.Root.Path(layout.CacheMountDir))
	for _, e := range entries {
		fi, ierr := e.Info()
		if ierr != nil || strings.HasSuffix(e.Name(), layout.CacheMountBegun) || !before.IsZero() && !fi.ModTime().Before(before) {
			continue
		}
		all = append(all, mount{e.Name(), fi.ModTime()})
	}
	slices.SortFunc(all, func(a, b mount) int { return a.used.Compare(b.used) })
	for _, m := range all {
		if err != nil || freed >= bytes || ctx.Err() != nil {
			break
		}
		var took int64
		if took, err = c.dropMount(ctx, m.key); took >= 0 {
			freed += took
			n++
		}
	}
	return n, freed, errors.Join(err, ctx.Err())
}

// DropMount removes a cache mount, if there is one and nobody uses it.
func (c *Collector) DropMount(ctx context.Context, key string) error {
	if _, err := os.Lstat(c.Root.Path(layout.CacheMountPath(key))); err != nil {
		return nil
	}
	_, err := c.dropMount(ctx, key)
	return err
}

// dropMount moves a cache mount to the trash, and returns its bytes; -1 if it is
// in use.
func (c *Collector) dropMount(ctx context.Context, key string) (int64, error) {
	rel := layout.CacheMountPath(key)
	end, ok := c.unused(ctx, key)
	if !ok {
		return -1, ctx.Err()
	}
	defer end()
	if !c.known(ctx, rel) {
		if err := c.measureOne(ctx, rel, ""); err != nil {
			return -1, err
		}
	}
	var took int64
	err := c.Journal.Trash(ctx, layout.MountNode(key), func(tx *metadata.Tx) (layout.Usage, error) {
		rec, err := tx.Measures().Get(rel)
		if errors.Is(err, errdefs.ErrNotFound) {
			err = nil
		}
		took = rec.Bytes
		return layout.Usage{Bytes: rec.Bytes, Inodes: rec.Inodes}, errors.Join(err, tx.Measures().Delete(rel))
	})
	return took, err
}

func (c *Collector) known(ctx context.Context, rel string) (known bool) {
	_ = c.DB.View(ctx, func(tx *metadata.Tx) error {
		known = tx.Measures().Has(rel)
		return nil
	})
	return known
}
