package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"varve.dev/content"
	"varve.dev/errdefs"
	"varve.dev/internal/budget"
	"varve.dev/layer"
	"varve.dev/layout"
)

// job brings one layer blob and unpacks it wherever the image has it.
type job struct {
	desc   ocispec.Descriptor
	unpack []int // places in the chain that have to be unpacked from it
	fetch  bool  // it is not in the store
}

// plan decides for each layer what has to be done. A layer that stands
// unpacked is neither fetched nor unpacked, whether its blob is kept or not.
func plan(p *picked, missing []bool, have func(digest.Digest) bool) (jobs []*job, exist []ocispec.Descriptor) {
	byDigest := map[digest.Digest]*job{}
	for i, desc := range p.layers {
		if missing != nil && !missing[i] {
			exist = append(exist, desc)
			continue
		}
		j := byDigest[desc.Digest]
		if j == nil {
			j = &job{desc: desc, fetch: !have(desc.Digest)}
			byDigest[desc.Digest] = j
			jobs = append(jobs, j)
		}
		if missing != nil {
			j.unpack = append(j.unpack, i)
		}
	}
	return jobs, exist
}

// leastSpace is what the jobs will take of the disk at least: what is compressed
// takes no less when it is unpacked.
func leastSpace(jobs []*job) (bytes int64) {
	for _, j := range jobs {
		if j.fetch {
			bytes += j.desc.Size
		}
		if compressed, err := images.DiffCompression(context.Background(), j.desc.MediaType); err == nil && compressed != "" && compressed != "unknown" {
			bytes += j.desc.Size * int64(len(j.unpack))
		}
	}
	return bytes
}

// source opens a layer's bytes from an offset; a registry, for a pull.
type source func(ctx context.Context, desc ocispec.Descriptor, offset int64) io.ReadCloser

// layerRun carries out the jobs of one image.
type layerRun struct {
	a         *assembly
	work      Unpack
	from      source
	progress  Progress
	downloads slots
	unpacks   slots
	mu        sync.Mutex // guards a.fresh and a.order
}

// extraUnpacks is how many layers may be unpacked beyond those that are being
// downloaded, so that a finished download makes room for the next at once.
const extraUnpacks = 2

// layers brings the layers of p into the assembly and unpacks them.
func (a *assembly) layers(ctx context.Context, p *picked, from source, parallel int, progress Progress) error {
	run := &layerRun{a: a, from: from, progress: progress,
		downloads: make(slots, parallel), unpacks: make(slots, parallel+extraUnpacks)}
	var missing []bool
	if a.store.unpacker != nil {
		work, err := a.store.unpacker.Begin(ctx, a.lease, p.diffIDs, a.barrier)
		if err != nil {
			return err
		}
		a.unpackings = append(a.unpackings, &unpacked{p.manifest.Digest, work})
		run.work, missing = work, work.Missing()
	}
	jobs, exist := plan(p, missing, a.has)
	if err := a.space.Reserve(ctx, leastSpace(jobs)); err != nil {
		return err
	}
	ctx = budget.Of(ctx, a.space)
	for _, desc := range exist {
		progress.send(Event{Blob: desc.Digest, Phase: Exists, Bytes: desc.Size, Total: desc.Size})
	}
	for _, j := range jobs {
		progress.send(Event{Blob: j.desc.Digest, Phase: Waiting, Total: j.desc.Size})
	}
	g, jobCtx := errgroup.WithContext(ctx)
	for _, j := range jobs {
		// Downloads begin in the order of the layers.
		if j.fetch {
			if err := run.downloads.take(jobCtx); err != nil {
				break // a job failed, or ctx ended
			}
		}
		g.Go(func() error {
			if err := run.do(jobCtx, j); err != nil {
				return err // names the blob
			}
			progress.send(Event{Blob: j.desc.Digest, Phase: Done, Bytes: j.desc.Size, Total: j.desc.Size})
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

func (r *layerRun) do(ctx context.Context, j *job) error {
	if !j.fetch {
		return r.unpackAll(ctx, j, func(ctx context.Context) (io.Reader, func() error, error) { return r.stored(ctx, j.desc) })
	}
	again, err := r.fetch(ctx, j)
	if again {
		// What an earlier pull left in the ingest was torn by a crash, or
		// came from a server that lied: once more, from nothing.
		if err := r.downloads.take(ctx); err != nil {
			return err
		}
		_, err = r.fetch(ctx, j)
	}
	return err
}

func (r *layerRun) stored(ctx context.Context, desc ocispec.Descriptor) (io.Reader, func() error, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.a.reader(ctx, desc)
}

// fetch downloads the blob and unpacks it on the way. It gives the download
// slot back. again tells that the error is the fault of what the ingest held
// before; the ingest is gone then.
func (r *layerRun) fetch(ctx context.Context, j *job) (again bool, err error) {
	in, err := r.a.open(ctx, j.desc)
	if err != nil {
		r.downloads.give()
		return false, err
	}
	old := in.Size()
	f := newFeed()
	f.start(in, old)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	var unpackErr error
	var unpacking sync.WaitGroup
	unpacking.Go(func() {
		unpackErr = r.unpackAll(ctx, j, func(ctx context.Context) (io.Reader, func() error, error) {
			return f.reader(ctx), func() error { return nil }, nil
		})
		if unpackErr != nil && !blameBlob(unpackErr) {
			cancel(unpackErr)
		}
	})
	err = r.download(ctx, j.desc, in, f)
	r.downloads.give()
	f.end(err)
	unpacking.Wait()
	return r.settle(j, in, old, err, unpackErr)
}

// blameBlob tells whether an unpack error may come from wrong bytes. The
// download then goes on to its end: "wrong digest" is the better word.
func blameBlob(err error) bool {
	return errors.Is(err, errdefs.ErrInvalidArgument) || errors.Is(err, errdefs.ErrFailedPrecondition) || errors.Is(err, errdefs.ErrDataLoss)
}

// settle decides what becomes of the ingest.
func (r *layerRun) settle(j *job, in *content.Ingest, old int64, downloadErr, unpackErr error) (again bool, err error) {
	if downloadErr == nil && unpackErr == nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.a.add(j.desc.Digest, in)
		return false, nil
	}
	if downloadErr == nil || (unpackErr != nil && errors.Is(downloadErr, context.Canceled)) {
		downloadErr = unpackErr // the cause, not the cancellation
	}
	wrong := blameBlob(downloadErr)
	if wrong || permanent(downloadErr) || r.a.private || in.Size() == 0 {
		err = in.Discard()
	} else {
		err = r.a.leave(j.desc.Digest, in)
	}
	return wrong && old > 0, errors.Join(downloadErr, err)
}

// download fills the ingest from where it stands and verifies the whole.
func (r *layerRun) download(ctx context.Context, desc ocispec.Descriptor, in *content.Ingest, f *feed) error {
	m := r.progress.meter(desc.Digest, Downloading, in.Size(), desc.Size)
	body := r.from(ctx, desc, in.Size())
	defer body.Close()
	buf := make([]byte, 256<<10)
	for {
		n, err := body.Read(buf)
		if n > 0 {
			if _, err := in.Write(buf[:n]); err != nil {
				return fmt.Errorf("blob %s: %w", desc.Digest, err)
			}
			f.grew(n)
			m.add(int64(n))
		}
		if err == io.EOF {
			return in.Verify(desc.Size, layout.BlobDigest(desc.Digest))
		}
		if err != nil {
			return err
		}
	}
}

// unpackAll unpacks the job's blob at all its places.
func (r *layerRun) unpackAll(ctx context.Context, j *job, open func(context.Context) (io.Reader, func() error, error)) error {
	g, ctx := errgroup.WithContext(ctx)
	for n, i := range j.unpack {
		g.Go(func() error {
			if err := r.unpacks.take(ctx); err != nil {
				return err
			}
			defer r.unpacks.give()
			blob, done, err := open(ctx)
			if err != nil {
				return err
			}
			if n == 0 {
				blob = &metered{blob, r.progress.meter(j.desc.Digest, Unpacking, 0, j.desc.Size)}
			}
			if err := errors.Join(r.unpack(ctx, i, blob), done()); err != nil {
				return fmt.Errorf("layer %s: %w", j.desc.Digest, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// unpack makes the tree of layer i.
func (r *layerRun) unpack(ctx context.Context, i int, blob io.Reader) error {
	stream, _, err := layer.Decompress(blob)
	if err == nil {
		defer stream.Close()
		err = r.work.Layer(ctx, i, stream)
	}
	if err != nil {
		if kindOf(err) != nil {
			// The decoders' own errors: the bytes are to blame.
			err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		return fmt.Errorf("unpack: %w", err)
	}
	// The decoder may have stopped before the blob's end; the blob's reader
	// says at its end whether the bytes were the right ones.
	_, err = io.Copy(io.Discard, blob)
	return err
}

type metered struct {
	io.Reader
	*meter
}

func (m *metered) Read(p []byte) (int, error) {
	n, err := m.Reader.Read(p)
	m.add(int64(n))
	return n, err
}

// slots is a counting semaphore.
type slots chan struct{}

func (s slots) take(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s slots) give() { <-s }
