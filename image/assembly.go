package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/internal/budget"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// assembly is an image on its way into the store: what was found there, held
// by a lease, and what is new, not yet visible. It ends with publish or
// abandon; both let go of everything.
type assembly struct {
	store   *Store
	purpose string
	lease   *metadata.Lease
	endTurn func()
	barrier *durable.Barrier
	space   *budget.Claim                     // set aside for what is to come
	found   map[digest.Digest]bool            // blobs in the store, held by the lease
	fresh   map[digest.Digest]*content.Ingest // whole and verified
	order   []digest.Digest                   // of fresh
	origin  string                            // repository that served the blobs, or ""

	unpackings []*unpacked
	private    bool // its ingests are no other's to go on with

	mu   sync.Mutex
	left []digest.Digest // blobs with an unfinished ingest, kept for a next try
}

// unpacked is a manifest whose layers are being unpacked.
type unpacked struct {
	manifest digest.Digest
	work     Unpack
}

// assemble begins to bring the blobs into the store. It waits for others that
// bring one of them.
func (s *Store) assemble(ctx context.Context, purpose, origin string, blobs []digest.Digest) (*assembly, error) {
	end, err := s.turns.take(ctx, blobs)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", purpose, err)
	}
	a := &assembly{
		store: s, purpose: purpose, origin: origin, endTurn: end, lease: s.db.NewLease(purpose), space: s.space.Claim(purpose),
		barrier: s.root.NewBarrier(), found: map[digest.Digest]bool{}, fresh: map[digest.Digest]*content.Ingest{},
	}
	if len(blobs) > 0 {
		if err := a.hold(ctx, blobs); err != nil {
			end()
			return nil, fmt.Errorf("%s: %w", purpose, err)
		}
	}
	return a, nil
}

// hold looks for blobs in the store, and holds what is there until the end of
// the assembly. Most pulls find nothing, and then nothing is written.
func (a *assembly) hold(ctx context.Context, blobs []digest.Digest) error {
	any := false
	err := a.store.db.View(ctx, func(tx *metadata.Tx) error {
		for _, d := range blobs {
			any = any || tx.Blobs().Has(layout.BlobDigest(d))
		}
		return nil
	})
	if err != nil || !any {
		return err
	}
	return a.lease.Hold(ctx, func(tx *metadata.Tx) (nodes []layout.Node, err error) {
		for _, d := range blobs {
			key := layout.BlobDigest(d)
			if a.found[d] = tx.Blobs().Has(key); a.found[d] {
				nodes = append(nodes, layout.BlobNode(key))
			}
		}
		return nodes, nil
	})
}

// has tells whether the blob is in the store or among what is new.
func (a *assembly) has(d digest.Digest) bool { return a.found[d] || a.fresh[d] != nil }

// sharedRef is the reference of a blob's ingest: every pull of the blob, from
// wherever, goes on with what the last one left.
func sharedRef(d digest.Digest) string { return "blob-" + d.String() }

// open starts or takes up the blob's ingest.
func (a *assembly) open(ctx context.Context, desc ocispec.Descriptor) (*content.Ingest, error) {
	if a.private {
		return a.store.blobs.NewIngest(ctx, "load", layout.BlobDigest(desc.Digest))
	}
	in, err := a.store.blobs.OpenIngest(ctx, sharedRef(desc.Digest), layout.BlobDigest(desc.Digest), desc.Size)
	if err != nil {
		return nil, err
	}
	if in.Size() > desc.Size {
		if err := in.Truncate(ctx, 0); err != nil {
			in.Close()
			return nil, err
		}
	}
	return in, nil
}

// add takes over an ingest that is whole and verified.
func (a *assembly) add(d digest.Digest, in *content.Ingest) {
	a.fresh[d] = in
	a.order = append(a.order, d)
}

// addSmall brings a blob that is in memory. Its bytes fit its digest.
func (a *assembly) addSmall(ctx context.Context, desc ocispec.Descriptor, data []byte) error {
	if a.has(desc.Digest) {
		return nil
	}
	in, err := a.open(ctx, desc)
	if err != nil {
		return err
	}
	if err = in.Truncate(ctx, 0); err == nil {
		_, err = in.Write(data)
	}
	if err == nil {
		err = in.Verify(desc.Size, layout.BlobDigest(desc.Digest))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("blob %s: %w", desc.Digest, err), in.Discard())
	}
	a.add(desc.Digest, in)
	return nil
}

// reader opens a blob of the store or of what is new.
func (a *assembly) reader(ctx context.Context, desc ocispec.Descriptor) (io.Reader, func() error, error) {
	if in := a.fresh[desc.Digest]; in != nil {
		return io.NewSectionReader(in, 0, in.Size()), func() error { return nil }, nil
	}
	r, err := a.store.blobs.ReaderAt(ctx, desc)
	if err != nil {
		return nil, nil, err
	}
	return io.NewSectionReader(r, 0, r.Size()), r.Close, nil
}

// publish makes everything that was brought visible under names, at once.
func (a *assembly) publish(ctx context.Context, images []layout.ImageMake, edges []layout.Edge) error {
	in := layout.IntentRecord{Purpose: a.purpose, Images: images}
	for _, d := range a.order {
		rec := layout.BlobRecord{}
		if a.origin != "" {
			rec.Origins = []string{a.origin}
		}
		move, err := a.fresh[d].Seal(a.barrier, rec)
		if err != nil {
			return a.abandon(err)
		}
		in.Blobs = append(in.Blobs, move)
	}
	for _, u := range a.unpackings {
		top, err := u.work.Finish(ctx, &in)
		if err != nil {
			return a.abandon(err)
		}
		if top != "" {
			edges = append(edges, layout.Edge{
				Parent: layout.BlobNode(layout.BlobDigest(u.manifest)), Rel: layout.RelUnpacked, Child: layout.SnapshotNode(top),
			})
		}
	}
	in.Edges = append(in.Edges, edges...)
	if err := a.store.journal.Publish(ctx, a.barrier, in); err != nil {
		if errors.Is(err, journal.ErrIntended) {
			a.unpackings = nil
			return a.letGo(err)
		}
		return a.abandon(err)
	}
	return a.letGo(nil)
}

// leave closes the ingest of a blob that did not come whole, for a next try.
func (a *assembly) leave(d digest.Digest, in *content.Ingest) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.left = append(a.left, d)
	return in.Close()
}

// abandon ends the assembly after an error, which it returns. Ingests stay
// when the next try can go on from them; a full disk gets back what was taken
// of it.
func (a *assembly) abandon(err error) error {
	a.barrier.Abandon()
	if errors.Is(err, errdefs.ErrResourceExhausted) {
		for _, d := range a.left {
			aerr := a.store.blobs.Abort(context.Background(), sharedRef(d))
			if !errors.Is(aerr, errdefs.ErrNotFound) && !errors.Is(aerr, errdefs.ErrPoisoned) {
				err = errors.Join(err, aerr)
			}
		}
	}
	keep := !a.private && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || (errors.Is(err, errdefs.ErrUnavailable) && !errors.Is(err, errdefs.ErrPoisoned)))
	for _, d := range a.order {
		in := a.fresh[d]
		if !keep || in.Size() <= maxSmall {
			err = errors.Join(err, in.Discard())
		}
	}
	return a.letGo(err)
}

// maxSmall is what is not worth keeping for a second try.
const maxSmall = 64 << 10

// letGo closes what is open and drops the lease. An error of the latter is no
// failure of the operation: a lease ends with the process at the latest.
func (a *assembly) letGo(err error) error {
	for _, in := range a.fresh {
		in.Close()
	}
	for _, u := range a.unpackings {
		u.work.Abandon()
	}
	a.space.Release()
	_ = a.lease.Release(context.Background())
	a.store.journal.Kick()
	a.endTurn()
	if err != nil {
		return fmt.Errorf("%s: %w", a.purpose, err)
	}
	return nil
}
