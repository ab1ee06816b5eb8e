package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// PushOptions may be left zero.
type PushOptions struct {
	Parallel int // uploads at once; 0 means 3
	// ByDigest leaves the repository's tags alone.
	ByDigest bool
	Progress Progress
}

// Push sends the image of the store named ref to its registry, under the same
// name, and returns what it is there. Blobs that the repository has are not
// sent; those that another repository of the same registry served are mounted
// from it. Of an index whose other manifests were never fetched, the manifest
// that is here is pushed alone.
//
// Errors: ErrNotFound for an image, or for a blob of it that was given up
// after it was unpacked; ErrPermissionDenied, ErrUnavailable.
func (s *Store) Push(ctx context.Context, ref Ref, options PushOptions) (ocispec.Descriptor, error) {
	rec, err := s.image(ctx, ref.String())
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return s.PushTarget(ctx, ref, rec.Target, options)
}

// PushTarget is Push for what need not have a name in the store.
func (s *Store) PushTarget(ctx context.Context, ref Ref, target ocispec.Descriptor, options PushOptions) (ocispec.Descriptor, error) {
	if options.Parallel <= 0 {
		options.Parallel = defaultParallel
	}
	docs := newDocuments(s, nil)
	what, err := s.whole(ctx, docs, target)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	p := &push{store: s, docs: docs, ref: ref, options: options, uploads: make(slots, options.Parallel), sent: map[digest.Digest]bool{}}
	// A new resolver for each push: the old one's tracker would remember as
	// sent what the registry has lost meanwhile.
	p.resolver = s.remotes.newResolver()
	at := ref
	if options.ByDigest {
		at = ref.WithDigest(what.Digest)
	}
	if err := p.tree(quiet(ctx), what, at); err != nil {
		s.remotes.forget(ref.Domain(), err)
		return ocispec.Descriptor{}, fmt.Errorf("push %s: %w", ref.Familiar(), err)
	}
	return what, p.noteOrigin(ctx)
}

// noteOrigin notes of all that was pushed that the repository has it: there it
// can be had again.
func (p *push) noteOrigin(ctx context.Context) error {
	here := p.ref.Repository()
	known := true
	for d := range p.sent {
		origins, err := p.store.origins(ctx, d)
		if errors.Is(err, errdefs.ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return err
		}
		known = known && slices.Contains(origins, here)
	}
	if known {
		return nil
	}
	err := p.store.db.Update(ctx, func(tx *metadata.Tx) error {
		for d := range p.sent {
			if err := tx.AddOrigin(layout.BlobDigest(d), here); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("push %s: it is there, but that could not be noted: %w", p.ref.Familiar(), err)
	}
	return nil
}

// whole returns target if everything below it is in the store, or for an
// index with gaps the one manifest that is used here.
func (s *Store) whole(ctx context.Context, docs *documents, target ocispec.Descriptor) (ocispec.Descriptor, error) {
	if !images.IsIndexType(target.MediaType) {
		return target, nil
	}
	var index ocispec.Index
	if err := readJSON(ctx, docs.read, target, maxManifest, &index); err != nil {
		return target, err
	}
	for _, child := range index.Manifests {
		_, err := s.blobs.Info(ctx, child.Digest)
		if errors.Is(err, errdefs.ErrNotFound) {
			p, err := s.localPick(ctx, target)
			if err != nil {
				return target, err
			}
			return p.manifest, nil
		}
		if err != nil {
			return target, err
		}
	}
	return target, nil
}

type push struct {
	store    *Store
	docs     *documents
	ref      Ref
	options  PushOptions
	resolver remotes.Resolver
	uploads  slots
	sent     map[digest.Digest]bool // what the registry has, or is about to
}

// tree pushes what desc refers to and then desc itself, under the name at: a
// registry refuses a manifest whose blobs it has not.
func (p *push) tree(ctx context.Context, desc ocispec.Descriptor, at Ref) error {
	var doc struct {
		Config    *ocispec.Descriptor
		Layers    []ocispec.Descriptor
		Manifests []ocispec.Descriptor
	}
	if err := readJSON(ctx, p.docs.read, desc, maxManifest, &doc); err != nil {
		return err
	}
	for _, child := range doc.Manifests {
		if err := p.tree(ctx, child, p.ref.WithDigest(child.Digest)); err != nil {
			return err
		}
	}
	blobs := doc.Layers
	if doc.Config != nil {
		blobs = append(blobs, *doc.Config)
	}
	pusher, err := p.resolver.Pusher(ctx, at.String())
	if err != nil {
		return remoteError("registry of "+at.Familiar(), err)
	}
	g, blobCtx := errgroup.WithContext(ctx)
	for _, blob := range blobs {
		if p.sent[blob.Digest] {
			continue
		}
		p.sent[blob.Digest] = true
		g.Go(func() error { return p.blob(blobCtx, pusher, blob) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	p.sent[desc.Digest] = true
	return p.upload(ctx, pusher, desc)
}

func (p *push) blob(ctx context.Context, pusher remotes.Pusher, desc ocispec.Descriptor) error {
	p.options.Progress.send(Event{Blob: desc.Digest, Phase: Waiting, Total: desc.Size})
	if err := p.uploads.take(ctx); err != nil {
		return err
	}
	defer p.uploads.give()
	origins, err := p.store.origins(ctx, desc.Digest)
	if err != nil {
		return err
	}
	desc.Annotations = p.mountFrom(origins)
	return p.upload(ctx, pusher, desc)
}

// upload sends one blob or manifest, from the start again when the connection
// breaks: few registries let an upload be taken up.
func (p *push) upload(ctx context.Context, pusher remotes.Pusher, desc ocispec.Descriptor) error {
	patience := p.store.remotes.options.Patience
	what := fmt.Sprintf("%s to %s", desc.Digest, p.ref.FamiliarRepository())
	for attempt := 1; ; attempt++ {
		err := remoteError(what, p.send(ctx, pusher, desc, patience))
		if err == nil || final(err) || ctx.Err() != nil || attempt >= patience.Attempts {
			return err
		}
		if err := sleep(ctx, patience.wait(attempt)); err != nil {
			return err
		}
	}
}

func (p *push) send(ctx context.Context, pusher remotes.Pusher, desc ocispec.Descriptor, patience Patience) error {
	w, err := pusher.Push(ctx, desc)
	if errors.Is(err, errdefs.ErrAlreadyExists) {
		p.options.Progress.send(Event{Blob: desc.Digest, Phase: Exists, Bytes: desc.Size, Total: desc.Size})
		return nil
	}
	if err != nil {
		return err
	}
	// What is damaged does not leave the store.
	err = p.store.blobs.Verify(ctx, desc.Digest)
	if err != nil {
		w.Close()
		return err
	}
	blob, err := p.store.blobs.ReaderAt(ctx, desc)
	if err != nil {
		w.Close()
		return err
	}
	defer blob.Close()
	// The writer waits on a pipe for a request that may have failed before
	// it read any of it. This is the deadline that the pipe lacks.
	limit := patience.Total + 2*patience.Answer
	ended := make(chan struct{})
	defer close(ended)
	watch := time.AfterFunc(limit, func() { closeUntil(ended, w) })
	defer watch.Stop()
	defer context.AfterFunc(ctx, func() { closeUntil(ended, w) })()
	body := &sendingBlob{io.NewSectionReader(blob, 0, blob.Size()), p.options.Progress.meter(desc.Digest, Uploading, 0, desc.Size), watch, limit}
	err = content.Copy(ctx, w, body, desc.Size, desc.Digest)
	w.Close()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil {
		p.options.Progress.send(Event{Blob: desc.Digest, Phase: Done, Bytes: desc.Size, Total: desc.Size})
	}
	return err
}

// closeUntil closes a writer until its user has ended. Once is not enough: a
// writer that is just taking up its pipe goes on to write into it, and nobody
// reads there.
func closeUntil(ended <-chan struct{}, w io.Closer) {
	for {
		w.Close()
		select {
		case <-ended:
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// sendingBlob counts what goes out. It can be sought, for a writer that asks
// for everything again after a challenge for credentials.
type sendingBlob struct {
	*io.SectionReader
	meter *meter
	watch *time.Timer
	limit time.Duration
}

func (b *sendingBlob) Read(p []byte) (int, error) {
	n, err := b.SectionReader.Read(p)
	b.watch.Reset(b.limit)
	b.meter.add(int64(n))
	return n, err
}

// WriteTo hides that of the SectionReader, which would not count.
func (b *sendingBlob) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{b})
}

func (s *Store) origins(ctx context.Context, d digest.Digest) ([]string, error) {
	var rec layout.BlobRecord
	err := s.db.View(ctx, func(tx *metadata.Tx) (err error) {
		rec, err = tx.Blobs().Get(layout.BlobDigest(d))
		return err
	})
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil, fmt.Errorf("blob %s is not in the store: %w", d, errdefs.ErrNotFound)
	}
	return rec.Origins, err
}

// mountFrom tells containerd's pusher, in its label, which repositories of
// the same registry the blob may be mounted from.
func (p *push) mountFrom(origins []string) map[string]string {
	var repos []string
	for _, o := range origins {
		named, err := reference.ParseNormalizedNamed(o)
		if err == nil && reference.Domain(named) == p.ref.Domain() && reference.Path(named) != p.ref.Path() {
			repos = append(repos, reference.Path(named))
		}
	}
	if len(repos) == 0 {
		return nil
	}
	host, _, _ := strings.Cut(p.ref.Domain(), ":") // the label has no port
	return map[string]string{labels.LabelDistributionSource + "." + host: strings.Join(repos, ",")}
}
