package daemon

import (
	"context"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"varve.dev/api/varve"
	"varve.dev/gc"
	"varve.dev/image"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/runtime/containers"
)

// measureWait is how long a command that has the store open by itself measures
// before it tells what there is: nobody does it in the background then.
const measureWait = 2 * time.Second

// DiskUsage implements varve.Space.
func (e *Engine) DiskUsage(ctx context.Context, req varve.DiskUsageRequest) (out varve.DiskUsage, err error) {
	switch {
	case req.Measure:
		_, err = e.collector.MeasureAll(ctx)
	case e.options.Embedded:
		some, cancel := context.WithTimeout(ctx, measureWait)
		_, _ = e.collector.MeasureAll(some) // what is not measured in time says when it was
		cancel()
	}
	if err != nil {
		return out, err
	}
	u := e.collector.Usage()
	whole := func(u layout.Usage, reclaimable int64) varve.Usage {
		return varve.Usage{Count: u.Count, Bytes: u.Bytes, Inodes: u.Inodes, Reclaimable: reclaimable}
	}
	images := u.Blobs.Plus(u.Layers).Minus(u.Cache)
	images.Count = u.Images
	cache := u.Cache
	cache.Count = u.Results
	ctrs := u.Containers
	ctrs.Count = u.NumContainers
	out = varve.DiskUsage{
		Images: whole(images, 0), Cache: whole(cache, cache.Bytes), CacheMounts: whole(u.CacheMounts, u.CacheMounts.Bytes),
		Containers: whole(ctrs, 0), Volumes: whole(u.Volumes, 0), Quarantine: whole(u.Quarantine, u.Quarantine.Bytes),
		Trash: whole(u.Trash, u.Trash.Bytes), Metadata: u.Metadata, Fixed: u.Fixed, Unfinished: u.Unfinished,
		InFlight: u.InFlight, Total: u.Total, Free: u.Free,
	}
	if req.Verbose {
		err = e.oneByOne(ctx, &out)
	}
	return out, err
}

// oneByOne fills in what costs more the more there is.
func (e *Engine) oneByOne(ctx context.Context, out *varve.DiskUsage) error {
	images, err := e.collector.Images(ctx)
	if err != nil {
		return err
	}
	for _, i := range images {
		line := varve.ImageUsage{Digest: string(i.Target), Created: i.Created, Bytes: i.Bytes, Unique: i.Unique, Shared: i.Bytes - i.Unique, InUse: i.InUse}
		for _, name := range i.Names {
			line.Names = append(line.Names, familiar(name))
		}
		if i.InUse == 0 {
			out.Images.Reclaimable += i.Unique
		}
		out.EachImage = append(out.EachImage, line)
	}
	if out.Again, err = e.collector.Again(ctx); err != nil {
		return err
	}
	ctrs, err := e.collector.Containers(ctx)
	if err != nil {
		return err
	}
	mounts, err := e.collector.Mounts(ctx)
	if err != nil {
		return err
	}
	out.EachContainer, out.EachMount = dirUsages(ctrs), dirUsages(mounts)
	results, err := e.collector.Results(ctx)
	for _, r := range results {
		out.EachResult = append(out.EachResult, varve.ResultUsage{
			Key: r.Key, Description: r.Description, Bytes: r.Size, Created: r.Created, LastUse: r.LastUse, Uses: r.Uses, InUse: r.InUse,
		})
	}
	return err
}

func dirUsages(all []gc.Measured) (out []varve.DirUsage) {
	for _, m := range all {
		out = append(out, varve.DirUsage{ID: m.ID, Name: m.Name, Bytes: m.Bytes, Inodes: m.Inodes, When: m.When})
	}
	return out
}

// Collect implements varve.Space.
func (e *Engine) Collect(ctx context.Context, req varve.CollectRequest) (out varve.Collected, err error) {
	l := e.options.Limits
	for of, value := range map[*int64]*int64{&l.Size: req.Size, &l.Free: req.Free, &l.Cache: req.Cache} {
		if value != nil {
			*of = *value
		}
	}
	for of, value := range map[*time.Duration]*time.Duration{&l.CacheAge: req.CacheAge, &l.Downloads: req.Downloads} {
		if value != nil {
			*of = *value
		}
	}
	if req.Retain != "" {
		l.Retain = gc.Retain(req.Retain)
	}
	if err := l.Check(); err != nil {
		return out, err
	}
	out.Before = e.collector.Usage().Total
	if out.Leases, err = e.collector.ExpireLeases(ctx, time.Now()); err != nil {
		return out, err
	}
	if err := e.collector.Settle(ctx, l); err != nil {
		return out, err
	}
	defer e.journal.Hurry()()
	err = e.journal.Drain(ctx)
	out.After = e.collector.Usage().Total
	return out, err
}

// Prune implements varve.Space. Containers go first, then images, which they may
// have kept, then build results, which these may have kept.
func (e *Engine) Prune(ctx context.Context, req varve.PruneRequest, progress func(varve.Event)) (out varve.Pruned, err error) {
	before := e.trashed()
	tell := func(what string) {
		if progress != nil {
			progress(varve.Event{ID: "prune", Name: what, Phase: varve.Running, Current: e.trashed() - before})
		}
	}
	steps := []struct {
		asked bool
		do    func() error
	}{
		{req.Containers, func() error { return e.pruneContainers(ctx, req, &out, tell) }},
		{req.Images, func() error { return e.pruneImages(ctx, req, &out, tell) }},
		{req.Builder, func() error { return e.pruneCache(ctx, req, &out, tell) }},
	}
	for _, s := range steps {
		if err == nil && s.asked {
			err = s.do()
		}
	}
	out.Bytes = e.trashed() - before
	if progress != nil {
		progress(varve.Event{ID: "prune", Name: "prune", Phase: varve.Done, Current: out.Bytes})
	}
	return out, err
}

// trashed is what was ever removed while this engine has had the store open.
func (e *Engine) trashed() int64 { return e.db.Trashed() }

func (e *Engine) pruneContainers(ctx context.Context, req varve.PruneRequest, out *varve.Pruned, tell func(string)) error {
	gone, err := e.containers.Prune(ctx, containers.Prune{Before: req.Until, Match: req.Match(), Progress: func(id layout.ContainerID) { tell("containers") }})
	for _, id := range gone {
		out.Containers = append(out.Containers, string(id))
	}
	return err
}

func (e *Engine) pruneImages(ctx context.Context, req varve.PruneRequest, out *varve.Pruned, tell func(string)) error {
	used, err := e.usedImages(ctx)
	if err != nil {
		return err
	}
	removed, err := e.images.Prune(ctx, image.Prune{
		Named: req.All, Before: req.Until, Match: req.Match(),
		Spare: func(target digest.Digest, names []string) bool {
			return used[target.String()] || slices.ContainsFunc(names, func(n string) bool { return used[n] || e.options.Limits.Pinned(n) })
		},
		Progress: func(image.Removed) { tell("images") },
	})
	for _, n := range removed.Untagged {
		out.Untagged = append(out.Untagged, familiar(n))
	}
	for _, d := range removed.Targets {
		out.Deleted = append(out.Deleted, d.String())
	}
	return err
}

// usedImages are the targets that containers stand on, and the names that they
// were made from.
func (e *Engine) usedImages(ctx context.Context) (map[string]bool, error) {
	used := map[string]bool{}
	images, err := e.collector.Images(ctx)
	if err != nil {
		return nil, err
	}
	for _, i := range images {
		used[string(i.Target)] = i.InUse > 0
	}
	err = e.db.View(ctx, func(tx *metadata.Tx) error {
		return tx.Containers().Each("", func(_ layout.ContainerID, rec layout.ContainerRecord) error {
			if ref, err := image.ParseRef(rec.Image); err == nil {
				used[ref.String()] = true
			}
			return nil
		})
	})
	return used, err
}

func (e *Engine) pruneCache(ctx context.Context, req varve.PruneRequest, out *varve.Pruned, tell func(string)) error {
	n, err := e.collector.PruneCache(ctx, gc.CachePrune{Before: req.Until, Keep: req.Keep, Held: req.All, Progress: func(int, int64) { tell("build cache") }})
	out.Results, out.Mounts = n.Records, n.Mounts
	return err
}
