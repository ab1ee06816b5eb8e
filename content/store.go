package content

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"sync"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/internal/budget"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// Store is the blobs of one open store. It implements containerd's
// core/content.Store.
type Store struct {
	root    *durable.Root
	db      *metadata.DB
	journal *journal.Journal
	space   *budget.Budget

	mu   sync.Mutex               // guards the rest; never held during I/O
	open map[layout.IngestID]bool // ingests with a writer
	left leftovers
	unsynced
}

var _ ccontent.Store = (*Store)(nil)

// New returns the blobs of the store that root, db and j belong to.
func New(root *durable.Root, db *metadata.DB, j *journal.Journal) *Store {
	return &Store{root: root, db: db, journal: j, open: map[layout.IngestID]bool{}, left: leftovers{bytes: map[layout.IngestID]int64{}}}
}

// Within makes every ingest take its bytes from a budget. To be called before
// the store is used.
func (s *Store) Within(space *budget.Budget) { s.space = space }

// leftovers are the bytes of ingests that nobody has open.
type leftovers struct {
	known sync.Once // the earlier processes' are in it
	bytes map[layout.IngestID]int64
	sum   int64
}

func (l *leftovers) set(id layout.IngestID, bytes int64) {
	l.sum += bytes - l.bytes[id]
	if bytes == 0 {
		delete(l.bytes, id)
	} else {
		l.bytes[id] = bytes
	}
}

// takes is what an ingest takes of the disk, 0 if it is not there.
func (s *Store) takes(id layout.IngestID) (bytes int64) {
	if _, err := os.Lstat(s.root.Path(layout.IngestPath(id))); err != nil {
		return 0
	}
	if fi, err := os.Lstat(s.root.Path(path.Join(layout.IngestPath(id), layout.IngestData))); err == nil {
		bytes = layout.OnDisk(fi.Size())
	}
	return bytes + ingestOverhead
}

// ingestOverhead is the directory of an ingest and its description.
const ingestOverhead = 2 * layout.DirSize

// Unfinished returns the bytes of ingests that nobody has open: of downloads
// that were cut off.
func (s *Store) Unfinished() (bytes int64) {
	s.left.known.Do(func() {
		entries, _ := os.ReadDir(s.root.Path(layout.IngestDir)) // what is not there takes nothing
		for _, e := range entries {
			id := layout.IngestID(e.Name())
			bytes := s.takes(id)
			s.mu.Lock()
			if !s.open[id] {
				s.left.set(id, bytes)
			}
			s.mu.Unlock()
		}
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.left.sum
}

// DropUnfinished throws away the ingests that nobody has open and that nobody
// has written to since. It returns their bytes.
func (s *Store) DropUnfinished(ctx context.Context, since time.Time) (bytes int64, err error) {
	list, err := s.ListStatuses(ctx)
	if err != nil {
		return 0, err
	}
	for _, st := range list {
		if !st.UpdatedAt.Before(since) {
			continue
		}
		switch aerr := s.Abort(ctx, st.Ref); {
		case aerr == nil:
			bytes += layout.OnDisk(st.Offset)
		case !errors.Is(aerr, errdefs.ErrNotFound) && !errors.Is(aerr, errdefs.ErrUnavailable): // done, or open again
			err = errors.Join(err, aerr)
		}
	}
	return bytes, err
}

func (s *Store) lock(id layout.IngestID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[id] {
		return false
	}
	s.open[id] = true
	s.left.set(id, 0)
	return true
}

func (s *Store) isOpen(id layout.IngestID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open[id]
}

func (s *Store) unlock(id layout.IngestID) {
	bytes := s.takes(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, id)
	s.left.set(id, bytes)
}

// Info returns what is recorded of a blob. Errors: ErrNotFound.
func (s *Store) Info(ctx context.Context, d digest.Digest) (ccontent.Info, error) {
	key, err := layout.ParseBlobDigest(d.String())
	if err != nil {
		return ccontent.Info{}, err
	}
	var info ccontent.Info
	err = s.db.View(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Blobs().Get(key)
		info = infoOf(key, rec)
		return err
	})
	return info, err
}

func infoOf(d layout.BlobDigest, rec layout.BlobRecord) ccontent.Info {
	return ccontent.Info{Digest: d.Digest(), Size: rec.Size, CreatedAt: rec.Created, UpdatedAt: rec.Updated, Labels: rec.Labels}
}

// Update changes a blob's labels: all of them, or with fieldpaths "labels" or
// "labels.<name>" those. Errors: ErrNotFound, ErrInvalidArgument for any other
// field.
func (s *Store) Update(ctx context.Context, info ccontent.Info, fieldpaths ...string) (ccontent.Info, error) {
	key, err := layout.ParseBlobDigest(info.Digest.String())
	if err != nil {
		return ccontent.Info{}, err
	}
	var out ccontent.Info
	err = s.db.Update(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Blobs().Get(key)
		if err != nil {
			return err
		}
		if rec.Labels, err = metadata.ChangeLabels(rec.Labels, info.Labels, fieldpaths); err != nil {
			return fmt.Errorf("blob %s: %w", key, err)
		}
		rec.Updated = time.Now().UTC()
		out = infoOf(key, rec)
		return tx.Blobs().Put(key, rec)
	})
	return out, err
}

// Walk calls fn for every blob that matches one of the filters, on the state
// of the store when the call began. fn may call the store.
func (s *Store) Walk(ctx context.Context, fn ccontent.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return err
	}
	var found []ccontent.Info
	err = s.db.View(ctx, func(tx *metadata.Tx) error {
		return tx.Blobs().Each("", func(d layout.BlobDigest, rec layout.BlobRecord) error {
			if info := infoOf(d, rec); filter.Match(ccontent.AdaptInfo(info)) {
				found = append(found, info)
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	for _, info := range found {
		if err := fn(info); err != nil {
			return err
		}
	}
	return nil
}

// Delete ends what holds a blob that came in through [Store.Writer]; the blob
// goes if nothing else needs it. Errors: ErrNotFound; ErrFailedPrecondition,
// naming what needs it, for a blob that only images or layers hold.
func (s *Store) Delete(ctx context.Context, d digest.Digest) error {
	key, err := layout.ParseBlobDigest(d.String())
	if err != nil {
		return err
	}
	node := layout.BlobNode(key)
	err = s.db.Update(ctx, func(tx *metadata.Tx) error {
		if !tx.Blobs().Has(key) {
			return fmt.Errorf("blob %s: %w", key, errdefs.ErrNotFound)
		}
		parents, err := tx.Parents(node)
		if err != nil {
			return err
		}
		for _, e := range parents {
			if e.Parent == layout.ContainerdNode {
				return tx.Unlink(e)
			}
		}
		if len(parents) > 0 {
			return fmt.Errorf("blob %s is needed by %s: %w", key, parents[0].Parent, errdefs.ErrFailedPrecondition)
		}
		return tx.Collect(node)
	})
	if err == nil {
		s.journal.Kick()
	}
	return err
}

// ReaderAt opens a blob for reading; only desc.Digest is used. A file that is
// missing or has another size than was recorded is reported as Corrupt (B1,
// B2), never served.
func (s *Store) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (ccontent.ReaderAt, error) {
	info, err := s.Info(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	d := layout.BlobDigest(info.Digest)
	f, err := os.Open(s.root.Path(layout.BlobPath(d)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &errdefs.Corrupt{Invariant: "B1", Object: "blob " + string(d), Detail: "its file is missing"}
	}
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w: %w", d, err, errdefs.ErrUnavailable)
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("blob %s: %w: %w", d, err, errdefs.ErrUnavailable)
	}
	if fi.Size() != info.Size {
		f.Close()
		return nil, &errdefs.Corrupt{Invariant: "B2", Object: "blob " + string(d),
			Detail: fmt.Sprintf("its file has %d bytes, recorded are %d", fi.Size(), info.Size)}
	}
	return &reader{File: f, size: info.Size}, nil
}

type reader struct {
	*os.File
	size int64
}

func (r *reader) Size() int64 { return r.size }

// Verify reads a blob and compares it with its digest. Errors: ErrNotFound;
// Corrupt (B1 to B3).
func (s *Store) Verify(ctx context.Context, d digest.Digest) error {
	r, err := s.ReaderAt(ctx, ocispec.Descriptor{Digest: d})
	if err != nil {
		return err
	}
	defer r.Close()
	sum := layout.Algorithm.Digester()
	if err := copyContext(ctx, sum.Hash(), io.NewSectionReader(r, 0, r.Size())); err != nil {
		return fmt.Errorf("blob %s: %w", d, err)
	}
	return sameDigest(d, sum.Digest())
}

func sameDigest(want, got digest.Digest) error {
	if got == want {
		return nil
	}
	return &errdefs.Corrupt{Invariant: "B3", Object: "blob " + want.String(), Detail: "its bytes have the digest " + got.String()}
}

// ReadBlob returns all of a small blob, such as a manifest, after checking its
// digest again. Errors: ErrNotFound; ErrResourceExhausted for one longer than
// limit bytes; Corrupt (B1 to B3).
func (s *Store) ReadBlob(ctx context.Context, d layout.BlobDigest, limit int64) ([]byte, error) {
	r, err := s.ReaderAt(ctx, ocispec.Descriptor{Digest: d.Digest()})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if r.Size() > limit {
		return nil, fmt.Errorf("blob %s has %d bytes, more than the %d that may be read at once: %w", d, r.Size(), limit, errdefs.ErrResourceExhausted)
	}
	data := make([]byte, r.Size())
	if _, err := io.ReadFull(io.NewSectionReader(r, 0, r.Size()), data); err != nil {
		return nil, fmt.Errorf("blob %s: %w: %w", d, err, errdefs.ErrUnavailable)
	}
	if err := sameDigest(d.Digest(), layout.Algorithm.FromBytes(data)); err != nil {
		return nil, err
	}
	return data, nil
}
