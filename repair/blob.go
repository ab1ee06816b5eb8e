package repair

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"varve.dev/errdefs"
	"varve.dev/fsck/reach"
	"varve.dev/layer"
	"varve.dev/layout"
)

// blobStep makes a blob stand in its place with the right bytes.
func (w *work) blobStep(_ context.Context, d layout.BlobDigest) *Step {
	step := &Step{Object: "blob " + string(d), Does: "write it again", order: blobsFirst}
	b := &blobRepair{work: w, blob: d, step: step}
	for _, id := range w.describedBy(d) {
		step.From = append(step.From, "the tree of layer "+string(id))
	}
	for _, id := range w.writtenAs(d) {
		step.From = append(step.From, "the tree of layer "+string(id))
	}
	if repos := w.known.repositories(d); w.registries != nil && len(repos) > 0 {
		step.From = append(step.From, "the registry ("+repos[0]+")")
		step.Fetch = w.known.descriptor(d).Size
	}
	step.run = func(ctx context.Context, out *Outcome) error {
		b.out = out
		return b.run(ctx)
	}
	return step
}

// describedBy returns the layers whose file manifest a blob is.
func (w *work) describedBy(d layout.BlobDigest) (ids []layout.LayerID) {
	for id, rec := range w.known.layers {
		if rec.Manifest == d {
			ids = append(ids, id)
		}
	}
	return ids
}

// writtenAs returns the layers that a blob may be written from again.
func (w *work) writtenAs(d layout.BlobDigest) (ids []layout.LayerID) {
	for id, rec := range w.known.layers {
		for _, b := range w.known.blobsOf(rec) {
			if b == d {
				ids = append(ids, id)
			}
		}
	}
	return ids
}

type blobRepair struct {
	*work
	blob layout.BlobDigest
	step *Step
	out  *Outcome
}

func (b *blobRepair) run(ctx context.Context) error {
	p, err := b.newPlace(b.step.Object, b.step.Findings, b.known.images[b.blob])
	if err != nil {
		return err
	}
	whole, err := b.forgotten(ctx)
	if whole || err != nil {
		_, cerr := p.close()
		return errors.Join(err, cerr)
	}
	err = p.take(layout.BlobPath(b.blob))
	if err == nil {
		err = b.again(ctx, p)
	}
	dir, cerr := p.close()
	b.out.Quarantine = dir
	if !b.out.Healed {
		b.out.Breaks = b.known.images[b.blob]
	}
	return errors.Join(err, cerr)
}

// forgotten tells whether the blob is as it is recorded on the disk, and memory,
// which had other bytes of it, has them no more. The error is the end of ctx: a
// blob of which nothing is known stays where it is.
func (b *blobRepair) forgotten(ctx context.Context) (bool, error) {
	name := b.Root.Path(layout.BlobPath(b.blob))
	sum, err := sumOf(ctx, reach.NewReader(), name, b.blob.Hex())
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	fi, serr := os.Lstat(name)
	if err != nil || serr != nil || sum != b.blob.Hex() || fi.Size() != b.known.blobs[b.blob].Size {
		return false, nil
	}
	b.out.Healed, b.out.From = true, "the disk; memory had something else"
	return true, nil
}

// again brings the blob back from the first that gives its very bytes. What was
// taken away is one: where the disk is bad, memory may still have the bytes.
func (b *blobRepair) again(ctx context.Context, p *place) error {
	var all error
	try := func(from string, write func(io.Writer) error) bool {
		_, err := b.publishBlob(ctx, b.blob, write)
		if err == nil {
			b.out.Healed, b.out.From = true, from
			return true
		}
		all = errors.Join(all, fmt.Errorf("%s: %w", from, err))
		return ctx.Err() != nil
	}
	if remembered := p.find(layout.BlobPath(b.blob)); remembered != "" {
		if try("memory", func(w io.Writer) error { return b.copyOut(remembered, w) }) {
			return nil
		}
	}
	for _, id := range b.describedBy(b.blob) {
		if try("the tree of layer "+string(id), func(w io.Writer) error { return b.describe(ctx, id, w) }) {
			return nil
		}
	}
	for _, id := range b.writtenAs(b.blob) {
		for _, c := range []layer.Compression{layer.Gzip, layer.Uncompressed} {
			if try("the tree of layer "+string(id), func(w io.Writer) error { return b.write(ctx, id, c, w) }) {
				return nil
			}
		}
	}
	if b.registries == nil || len(b.known.repositories(b.blob)) == 0 {
		return all
	}
	fetched, err := b.fetchBlob(ctx, b.blob)
	b.out.Fetched = fetched
	if err == nil {
		b.out.Healed, b.out.From = true, "the registry"
		return nil
	}
	return errors.Join(all, err)
}

// copyOut writes what reading a file of the store gives.
func (w *work) copyOut(rel string, out io.Writer) error {
	f, err := os.Open(w.Root.Path(rel))
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	defer f.Close()
	_, err = io.Copy(out, f)
	return err
}

// describe writes a layer's file manifest.
func (w *work) describe(ctx context.Context, id layout.LayerID, out io.Writer) error {
	t := &treeRepair{id: id}
	m, err := layer.Walk(ctx, w.Root.Path(t.tree()), layer.WalkOptions{})
	if err != nil {
		return err
	}
	return m.Encode(out)
}

// write writes a layer as a blob.
func (w *work) write(ctx context.Context, id layout.LayerID, c layer.Compression, out io.Writer) error {
	t := &treeRepair{work: w, id: id, rec: w.known.layers[id]}
	files, err := t.manifest(ctx)
	if err != nil {
		return err
	}
	z, err := layer.Compress(out, c)
	if err != nil {
		return err
	}
	return errors.Join(layer.Export(ctx, z, files, w.Root.Path(t.tree()), layer.ExportOptions{}), z.Close())
}

// fetchBlob brings a blob from one of its registries into the store, and
// returns how many bytes were fetched.
func (w *work) fetchBlob(ctx context.Context, d layout.BlobDigest) (fetched int64, err error) {
	desc := w.known.descriptor(d)
	for _, repository := range w.known.repositories(d) {
		var n int64
		n, err = w.publishBlob(ctx, d, func(out io.Writer) error {
			body, err := w.registries.Open(ctx, repository, desc, 0)
			if err != nil {
				return err
			}
			defer body.Close()
			_, err = io.Copy(out, io.LimitReader(body, desc.Size+1))
			return err
		})
		if fetched += n; err == nil || ctx.Err() != nil {
			return fetched, err
		}
		err = fmt.Errorf("%s: %w", repository, err)
	}
	if err == nil {
		err = fmt.Errorf("blob %s: nobody is known to have it: %w", d, errdefs.ErrNotFound)
	}
	return fetched, err
}

// publishBlob puts a blob that write gives into the store, if its bytes have
// the digest, and returns how many there were.
func (w *work) publishBlob(ctx context.Context, d layout.BlobDigest, write func(io.Writer) error) (int64, error) {
	in, err := w.Blobs.OpenIngest(ctx, "repair-"+string(d)+"-"+layout.NewID(), d, 0)
	if err != nil {
		return 0, err
	}
	err = write(in)
	size := in.Size()
	if err == nil {
		err = in.Verify(0, d)
	}
	if err != nil {
		return size, errors.Join(err, in.Discard())
	}
	barrier := w.Root.NewBarrier()
	now := time.Now().UTC()
	move, err := in.Seal(barrier, layout.BlobRecord{Created: now, Updated: now})
	if err != nil {
		barrier.Abandon()
		return size, errors.Join(err, in.Discard())
	}
	publication := layout.IntentRecord{Purpose: "repair blob " + string(d), Blobs: []layout.BlobMove{move}}
	for _, manifest := range w.known.parent[d] {
		publication.Edges = append(publication.Edges, layout.Edge{
			Parent: layout.BlobNode(manifest), Rel: layout.RelContent, Child: layout.BlobNode(d),
		})
	}
	if err := w.setAside(d); err != nil {
		barrier.Abandon()
		return size, errors.Join(err, in.Discard())
	}
	return size, errors.Join(w.Journal.Publish(ctx, barrier, publication), in.Close())
}

// setAside makes room for a blob that is proven: what stands in its place is
// damaged, or the very same.
func (w *work) setAside(d layout.BlobDigest) error {
	if _, err := os.Lstat(w.Root.Path(layout.BlobPath(d))); err != nil {
		return nil
	}
	p, err := w.newPlace("blob "+string(d), nil, w.known.images[d])
	if err != nil {
		return err
	}
	if err := p.take(layout.BlobPath(d)); err != nil {
		return err
	}
	_, err = p.close()
	return err
}
