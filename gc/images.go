package gc

import (
	"context"
	"errors"
	"slices"
	"time"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// dropImages takes names away from images that no container stands on and no pin
// keeps, the longest unused first, until so many bytes are free or none is left.
func (c *Collector) dropImages(ctx context.Context, l Limits, bytes int64) (freed int64, err error) {
	type image struct {
		name string
		used time.Time
	}
	var all []image
	err = c.DB.View(ctx, func(tx *metadata.Tx) error {
		all = all[:0]
		return tx.Images().Each("", func(name string, rec layout.ImageRecord) error {
			if !l.Pinned(name) {
				all = append(all, image{name, rec.LastUse()})
			}
			return nil
		})
	})
	slices.SortFunc(all, func(a, b image) int { return a.used.Compare(b.used) })
	defer c.Journal.Kick()
	for _, i := range all {
		if err != nil || freed >= bytes || ctx.Err() != nil {
			break
		}
		var n int64
		err = c.DB.Update(ctx, func(tx *metadata.Tx) error {
			n, err = dropImage(tx, i.name, i.used)
			return err
		})
		freed += n
	}
	return freed, errors.Join(err, ctx.Err())
}

// dropImage drops a name that was not used since, if no container stands on what
// it names.
func dropImage(tx *metadata.Tx, name string, used time.Time) (int64, error) {
	rec, err := tx.Images().Get(name)
	if errors.Is(err, errdefs.ErrNotFound) || err == nil && rec.LastUse().After(used) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	unpacked, err := unpackedBelow(tx, layout.BlobNode(layout.BlobDigest(rec.Target.Digest)))
	if err != nil {
		return 0, err
	}
	for _, n := range unpacked {
		above, err := tx.ParentsBy(n, layout.RelParent)
		if err != nil {
			return 0, err
		}
		for _, e := range above {
			if held, err := tx.ParentsBy(e.Parent, layout.RelRootfs); err != nil || len(held) > 0 {
				return 0, err
			}
		}
	}
	return freeing(tx, func() error { return tx.Drop(layout.ImageNode(name)) })
}
