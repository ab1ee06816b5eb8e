package content

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"time"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Ingest is a blob on its way into the store, open for writing. It belongs to
// one goroutine, but for ReadAt.
type Ingest struct {
	store *Store
	id    layout.IngestID
	info  layout.IngestRecord
	once  bool          // nobody takes it up
	file  *durable.File // nil once it is sealed
	size  int64         // then
	hash  hash.Hash
	last  time.Time // of the last write
}

// blobPerm is the mode of a blob: nobody writes to it again (B5).
const blobPerm fs.FileMode = 0o444

// OpenIngest opens the ingest with the caller's reference ref, taking over
// what an earlier writer left. expected and total describe the blob if they
// are known ("" and 0 otherwise).
//
// Errors: ErrUnavailable while another writer has it open; ErrInvalidArgument
// for an empty reference.
func (s *Store) OpenIngest(ctx context.Context, ref string, expected layout.BlobDigest, total int64) (*Ingest, error) {
	if err := layout.CheckName("ingest reference", ref); err != nil {
		return nil, err
	}
	id := layout.IngestFor(ref)
	if !s.lock(id) {
		return nil, fmt.Errorf("ingest %q is being written by someone else: %w", ref, errdefs.ErrUnavailable)
	}
	in, err := s.openIngest(ctx, id, layout.IngestRecord{Ref: ref, Expected: expected, Total: total, Started: time.Now().UTC()})
	if err != nil {
		s.unlock(id)
		return nil, fmt.Errorf("ingest %q: %w", ref, err)
	}
	return in, nil
}

func (s *Store) openIngest(ctx context.Context, id layout.IngestID, want layout.IngestRecord) (*Ingest, error) {
	in := &Ingest{store: s, id: id, info: want, hash: sha256.New(), last: want.Started}
	old, err := s.readInfo(id)
	fresh := err != nil || old.Ref != want.Ref || (want.Expected != "" && old.Expected != "" && old.Expected != want.Expected)
	if fresh {
		if err := s.root.RemoveAll(layout.IngestPath(id)); err != nil {
			return nil, err
		}
		if err := s.startIngest(id, want); err != nil {
			return nil, err
		}
	} else {
		in.info.Started = old.Started
		if want.Expected == "" {
			in.info.Expected = old.Expected
		}
		if want.Total == 0 {
			in.info.Total = old.Total
		}
	}
	in.file, err = s.root.AppendFile(in.path(layout.IngestData), 0o600)
	if err != nil {
		return nil, err
	}
	if !fresh {
		if in.last, err = in.file.ModTime(); err != nil {
			in.file.Close()
			return nil, err
		}
	}
	if err := in.rehash(ctx); err != nil {
		in.file.Close()
		return nil, err
	}
	return in, nil
}

// NewIngest begins an ingest that nobody takes up: it goes when it is closed
// unless it was sealed by then. It has no description, so what a crash leaves
// of it goes with the next recovery (T-N1).
func (s *Store) NewIngest() (*Ingest, error) {
	now := time.Now().UTC()
	in := &Ingest{store: s, id: layout.IngestID(layout.NewID()), once: true, hash: sha256.New(), last: now}
	err := s.root.Mkdir(layout.IngestPath(in.id), 0o700)
	if err == nil {
		durable.At(layout.PointIngestOpened)
		in.file, err = s.root.CreateFile(in.path(layout.IngestData), 0o600)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("new ingest: %w", err), s.root.RemoveAll(layout.IngestPath(in.id)))
	}
	return in, nil
}

// startIngest makes the directory of an ingest, without syncing it: losing it
// loses nothing that was promised.
func (s *Store) startIngest(id layout.IngestID, rec layout.IngestRecord) error {
	if err := s.root.Mkdir(layout.IngestPath(id), 0o700); err != nil {
		return err
	}
	durable.At(layout.PointIngestOpened)
	data, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInternal)
	}
	f, err := s.root.CreateFile(path.Join(layout.IngestPath(id), layout.IngestInfo), 0o600)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func (s *Store) readInfo(id layout.IngestID) (layout.IngestRecord, error) {
	var rec layout.IngestRecord
	data, err := os.ReadFile(s.root.Path(path.Join(layout.IngestPath(id), layout.IngestInfo)))
	if errors.Is(err, fs.ErrNotExist) {
		return rec, fmt.Errorf("ingest %s: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return rec, fmt.Errorf("ingest %s: %w: %w", id, err, errdefs.ErrUnavailable)
	}
	if err := json.Unmarshal(data, &rec); err != nil {
		return rec, &errdefs.Corrupt{Invariant: "N1", Object: "ingest " + string(id), Detail: err.Error()}
	}
	return rec, nil
}

func (in *Ingest) path(name string) string { return path.Join(layout.IngestPath(in.id), name) }

// rehash brings the digest up to what the file holds.
func (in *Ingest) rehash(ctx context.Context) error {
	in.hash.Reset()
	return copyContext(ctx, in.hash, io.NewSectionReader(in.file, 0, in.file.Size()))
}

// Size returns how many bytes the ingest holds: where the next write goes.
func (in *Ingest) Size() int64 {
	if in.file == nil {
		return in.size
	}
	return in.file.Size()
}

// Write appends p.
func (in *Ingest) Write(p []byte) (int, error) {
	n, err := in.file.Write(p)
	in.hash.Write(p[:n])
	in.last = time.Now().UTC()
	durable.At(layout.PointIngestPartial)
	return n, err
}

// ReadAt reads what was written. It may run beside Write.
func (in *Ingest) ReadAt(p []byte, off int64) (int, error) { return in.file.ReadAt(p, off) }

// Truncate cuts the ingest to size bytes.
func (in *Ingest) Truncate(ctx context.Context, size int64) error {
	if err := in.file.Truncate(size); err != nil {
		return err
	}
	return in.rehash(ctx)
}

// Digest returns the digest of what was written so far.
func (in *Ingest) Digest() layout.BlobDigest {
	return layout.BlobDigest(string(layout.Algorithm) + ":" + hex.EncodeToString(in.hash.Sum(nil)))
}

// Verify compares what was written with size (0: any) and digest ("": any).
// The error is of kind ErrFailedPrecondition and names both sides.
func (in *Ingest) Verify(size int64, digest layout.BlobDigest) error {
	if size > 0 && size != in.Size() {
		return fmt.Errorf("blob %s is %d bytes long, %d were announced: %w", digest, in.Size(), size, errdefs.ErrFailedPrecondition)
	}
	if got := in.Digest(); digest != "" && digest != got {
		return fmt.Errorf("blob %s has the digest %s: %w", digest, got, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// Seal ends the writing of a verified blob and hands its file to barrier. The
// move it returns goes into a publication that waits for that barrier; until
// the publication is done [Ingest.Close] must not be called.
func (in *Ingest) Seal(barrier *durable.Barrier, rec layout.BlobRecord) (layout.BlobMove, error) {
	digest := in.Digest()
	rec.Size = in.Size()
	if rec.Created.IsZero() {
		rec.Created = time.Now().UTC()
	}
	if rec.Updated.IsZero() {
		rec.Updated = rec.Created
	}
	if err := in.file.Seal(barrier, blobPerm); err != nil {
		return layout.BlobMove{}, err
	}
	in.file, in.size = nil, rec.Size
	durable.At(layout.PointIngestWhole)
	return layout.BlobMove{Digest: digest, From: in.path(layout.IngestData), Record: rec}, nil
}

// Close lets go of the ingest; what was written stays for the next writer
// with the same reference. It may be called twice.
func (in *Ingest) Close() error {
	if in.store == nil {
		return nil
	}
	var err error
	switch {
	case in.file == nil:
	case in.once:
		err = errors.Join(in.store.root.RemoveAll(layout.IngestPath(in.id)), in.file.Close())
	default:
		// The kernel's own time stamp is coarser than what Status has
		// told during the writing.
		err = errors.Join(in.file.SetModTime(in.last), in.file.Close())
	}
	in.store.unlock(in.id)
	in.store = nil
	return err
}

// Discard throws the ingest away.
func (in *Ingest) Discard() error {
	if in.store == nil {
		return nil
	}
	err := in.store.root.RemoveAll(layout.IngestPath(in.id))
	return errors.Join(err, in.Close())
}

// copyContext copies until ctx ends.
func copyContext(ctx context.Context, w io.Writer, r io.Reader) error {
	buf := make([]byte, 256<<10)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := r.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
		}
	}
}
