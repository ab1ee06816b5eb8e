package content

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/opencontainers/go-digest"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// Writer opens an ingest for a caller that commits it by itself. The blob is
// then held as a root until [Store.Delete].
//
// Errors: ErrAlreadyExists if the descriptor's blob is in the store;
// ErrUnavailable while another writer has the reference.
func (s *Store) Writer(ctx context.Context, opts ...ccontent.WriterOpt) (ccontent.Writer, error) {
	var w ccontent.WriterOpts
	for _, opt := range opts {
		if err := opt(&w); err != nil {
			return nil, err
		}
	}
	var expected layout.BlobDigest
	if w.Desc.Digest != "" {
		d, err := layout.ParseBlobDigest(w.Desc.Digest.String())
		if err != nil {
			return nil, err
		}
		expected = d
		held, err := s.hold(ctx, d)
		if err != nil {
			return nil, err
		}
		if held {
			return nil, fmt.Errorf("blob %s: %w", d, errdefs.ErrAlreadyExists)
		}
	}
	in, err := s.OpenIngest(ctx, w.Ref, expected, w.Desc.Size)
	if err != nil {
		return nil, err
	}
	return &writer{store: s, in: in}, nil
}

// hold makes a blob that exists a root of containerd's API as well, and tells
// whether it exists: a caller who is told "already exists" counts on it.
func (s *Store) hold(ctx context.Context, d layout.BlobDigest) (bool, error) {
	if _, err := s.Info(ctx, d.Digest()); errors.Is(err, errdefs.ErrNotFound) {
		return false, nil
	}
	held := false
	err := s.db.Update(ctx, func(tx *metadata.Tx) error {
		if held = tx.Blobs().Has(d); !held {
			return nil
		}
		return tx.Link(apiEdge(d))
	})
	return held, err
}

func apiEdge(d layout.BlobDigest) layout.Edge {
	return layout.Edge{Parent: layout.ContainerdNode, Rel: layout.RelHolds, Child: layout.BlobNode(d)}
}

// writer adapts an Ingest to containerd's interface.
type writer struct {
	store *Store
	in    *Ingest
}

func (w *writer) Write(p []byte) (int, error) { return w.in.Write(p) }
func (w *writer) Close() error                { return w.in.Close() }
func (w *writer) Digest() digest.Digest       { return w.in.Digest().Digest() }
func (w *writer) Status() (ccontent.Status, error) {
	return statusOf(w.in.info, w.in.Size(), w.in), nil
}

func (w *writer) Truncate(size int64) error {
	return w.in.Truncate(context.Background(), size)
}

// Commit verifies and publishes the blob. After an error of kind
// ErrFailedPrecondition the ingest stays as it was; after ErrAlreadyExists it
// is gone, and the blob that exists is held for the caller.
func (w *writer) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...ccontent.Opt) error {
	if w.in.store == nil {
		return fmt.Errorf("commit of a closed writer: %w", errdefs.ErrFailedPrecondition)
	}
	defer w.in.Close()
	var base ccontent.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return err
		}
	}
	want := w.in.info.Expected
	if expected != "" {
		d, err := layout.ParseBlobDigest(expected.String())
		if err != nil {
			return err
		}
		want = d
	}
	if err := w.in.Verify(size, want); err != nil {
		return err
	}
	d := w.in.Digest()
	if held, err := w.store.hold(ctx, d); err != nil {
		return err
	} else if held {
		if err := w.in.Discard(); err != nil {
			return err
		}
		return fmt.Errorf("blob %s: %w", d, errdefs.ErrAlreadyExists)
	}
	barrier := w.store.root.NewBarrier()
	move, err := w.in.Seal(barrier, layout.BlobRecord{Labels: base.Labels})
	if err != nil {
		return err
	}
	return w.store.journal.Publish(ctx, barrier, layout.IntentRecord{
		Purpose: "commit blob " + string(d),
		Blobs:   []layout.BlobMove{move},
		Edges:   []layout.Edge{apiEdge(d)},
	})
}

// Status returns how far an ingest has come. Errors: ErrNotFound.
func (s *Store) Status(ctx context.Context, ref string) (ccontent.Status, error) {
	return s.status(layout.IngestFor(ref))
}

func (s *Store) status(id layout.IngestID) (ccontent.Status, error) {
	rec, err := s.readInfo(id)
	if err == nil && rec.Private {
		err = fmt.Errorf("ingest %q is not for others: %w", rec.Ref, errdefs.ErrNotFound)
	}
	if err != nil {
		return ccontent.Status{}, err
	}
	fi, err := os.Stat(s.root.Path(path.Join(layout.IngestPath(id), layout.IngestData)))
	if err != nil {
		return ccontent.Status{}, fmt.Errorf("ingest %q: %w: %w", rec.Ref, err, errdefs.ErrNotFound)
	}
	st := statusOf(rec, fi.Size(), nil)
	st.UpdatedAt = fi.ModTime()
	return st, nil
}

func statusOf(rec layout.IngestRecord, offset int64, in *Ingest) ccontent.Status {
	st := ccontent.Status{
		Ref: rec.Ref, Offset: offset, Total: rec.Total, Expected: rec.Expected.Digest(),
		StartedAt: rec.Started, UpdatedAt: rec.Started,
	}
	if in != nil {
		st.UpdatedAt = in.last
	}
	return st
}

// ListStatuses returns every ingest that matches one of the filters.
func (s *Store) ListStatuses(ctx context.Context, fs ...string) ([]ccontent.Status, error) {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.root.Path(layout.IngestDir))
	if err != nil {
		return nil, fmt.Errorf("list ingests: %w: %w", err, errdefs.ErrUnavailable)
	}
	var out []ccontent.Status
	for _, e := range entries {
		id := layout.IngestID(e.Name())
		st, err := s.status(id)
		if errdefs.AsCorrupt(err) != nil && !s.isOpen(id) {
			st, err = s.status(id) // it was just beginning, and has ended
		}
		if errors.Is(err, errdefs.ErrNotFound) || errdefs.AsCorrupt(err) != nil && s.isOpen(id) {
			continue // ended between the listing and now, or is just beginning
		}
		if err != nil {
			return nil, err
		}
		if filter.Match(adaptStatus(st)) {
			out = append(out, st)
		}
	}
	return out, nil
}

// adaptStatus lets filters select ingests by their reference.
func adaptStatus(st ccontent.Status) filters.Adaptor {
	return filters.AdapterFunc(func(fieldpath []string) (string, bool) {
		if len(fieldpath) == 1 && fieldpath[0] == "ref" {
			return st.Ref, true
		}
		return "", false
	})
}

// Abort throws an ingest away. Errors: ErrNotFound; ErrUnavailable while a
// writer has it open.
func (s *Store) Abort(ctx context.Context, ref string) error {
	id := layout.IngestFor(ref)
	if !s.lock(id) {
		return fmt.Errorf("ingest %q is being written: %w", ref, errdefs.ErrUnavailable)
	}
	defer s.unlock(id)
	if err := s.journal.FinishPending(ctx); err != nil {
		return fmt.Errorf("ingest %q: %w", ref, err) // it may be of this one
	}
	if _, err := os.Lstat(s.root.Path(layout.IngestPath(id))); err != nil {
		return fmt.Errorf("ingest %q: %w: %w", ref, err, errdefs.ErrNotFound)
	}
	return s.root.RemoveAll(layout.IngestPath(id))
}
