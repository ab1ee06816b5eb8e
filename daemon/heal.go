package daemon

import (
	"context"
	"errors"
	"slices"
	"strings"

	"varve.dev/api/varve"
	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/image"
	"varve.dev/layout"
	"varve.dev/repair"
)

// healing runs do, and again for each object that it finds damaged and that
// can be made whole: from what the store has, or from the registries that it
// came from. What cannot is do's error, with the invariant's number.
func (e *Engine) healing(ctx context.Context, r varve.Registry, do func() error) error {
	tried := map[string]bool{}
	for {
		err := do()
		object, ok := e.damaged(err)
		if !ok || tried[object] || ctx.Err() != nil {
			return err
		}
		tried[object] = true
		if herr := e.heal(ctx, r, object, errdefs.AsCorrupt(err).Invariant); herr != nil {
			return errors.Join(err, herr)
		}
	}
}

// damaged returns the blob or layer that an error is about, as findings name
// them.
func (e *Engine) damaged(err error) (object string, ok bool) {
	c := errdefs.AsCorrupt(err)
	if c == nil {
		return "", false
	}
	if rel, ok := strings.CutPrefix(c.Object, e.root.Path(layout.LayersDir)+"/"); ok {
		id, _, _ := strings.Cut(rel, "/")
		return "layer " + id, true
	}
	kind, _, _ := strings.Cut(c.Object, " ")
	return c.Object, kind == layout.KindLayer || kind == layout.KindBlob
}

// heal repairs one object.
func (e *Engine) heal(ctx context.Context, r varve.Registry, object, invariant string) error {
	found := &fsck.Report{Findings: []fsck.Finding{{Invariant: invariant, Object: object}}}
	plan, err := e.repairer.Plan(ctx, found, repositories{r})
	if err != nil {
		return err
	}
	return e.repairer.Run(ctx, plan, func(s *repair.Step) {})
}

// Quarantine implements varve.Backend.
func (e *Engine) Quarantine(ctx context.Context) (out []varve.Quarantined, err error) {
	list, err := e.repairer.Quarantine(ctx)
	for _, q := range list {
		out = append(out, varve.Quarantined{
			ID: q.ID, When: q.Note.When, Object: q.Note.Object, Found: q.Note.Found, Images: q.Note.Images, Bytes: q.Bytes,
		})
	}
	return out, err
}

// Discard implements varve.Backend.
func (e *Engine) Discard(ctx context.Context, ids []string) error {
	return e.repairer.Discard(ctx, ids)
}

// usable tells whether an image that is about to be used, or that a pull says
// is there, is whole as far as a look at its files tells.
func (e *Engine) usable(ctx context.Context, d image.Details) error {
	for _, desc := range slices.Concat(d.Documents, d.Layers) {
		r, err := e.blobs.ReaderAt(ctx, desc)
		if errors.Is(err, errdefs.ErrNotFound) {
			continue // a layer's blob need not be kept
		}
		if err != nil {
			return err
		}
		r.Close()
	}
	return e.snaps.Usable(ctx, d.Snapshot)
}
