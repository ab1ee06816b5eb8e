package content

import (
	"cmp"
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
	"varve.dev/internal/budget"
	"varve.dev/layout"
)

// Ingest is a blob on its way into the store, open for writing. It belongs to
// one goroutine, but for ReadAt.
type Ingest struct {
	store *Store
	id    layout.IngestID
	info  layout.IngestRecord
	file  *durable.File // nil once it is sealed
	size  int64         // of a sealed one
	hash  hash.Hash
	last  time.Time // of the last write
	// ctx is that of the operation which writes: io.Writer has no place for
	// it.
	ctx   context.Context
	space *budget.Claim
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
	return s.begin(ctx, id, layout.IngestRecord{Ref: ref, Expected: expected, Total: total})
}

// NewIngest begins an ingest that only its caller can go on with: what a crash
// leaves of it is removed. purpose is for people.
func (s *Store) NewIngest(ctx context.Context, purpose string, expected layout.BlobDigest) (*Ingest, error) {
	ref := purpose + "-" + layout.NewID()
	id := layout.IngestFor(ref)
	s.lock(id)
	return s.begin(ctx, id, layout.IngestRecord{Ref: ref, Expected: expected, Private: true})
}

func (s *Store) begin(ctx context.Context, id layout.IngestID, rec layout.IngestRecord) (*Ingest, error) {
	rec.Started = time.Now().UTC()
	var in *Ingest
	err := s.journal.FinishPending(ctx) // it may be of what is left here
	if err == nil {
		in, err = s.openIngest(ctx, id, rec)
	}
	if err != nil {
		s.unlock(id)
		return nil, fmt.Errorf("ingest %q: %w", rec.Ref, err)
	}
	return in, nil
}

func (s *Store) openIngest(ctx context.Context, id layout.IngestID, want layout.IngestRecord) (*Ingest, error) {
	in := &Ingest{store: s, id: id, info: want, hash: sha256.New(), last: want.Started, ctx: ctx, space: s.space.Claim("blob " + cmp.Or(string(want.Expected), want.Ref))}
	old, err := s.readInfo(id)
	fresh := err != nil || old.Ref != want.Ref || (want.Expected != "" && old.Expected != "" && old.Expected != want.Expected)
	if fresh {
		if err = in.start(); err != nil {
			_ = s.root.RemoveAll(layout.IngestPath(id)) // a full disk wants it back
		}
	} else {
		err = in.takeUp(ctx, old)
	}
	if err == nil {
		err = in.space.Write(ctx, ingestOverhead+layout.OnDisk(in.Size()))
	}
	if err != nil {
		in.space.Release()
		if in.file != nil {
			in.file.Close()
		}
		return nil, err
	}
	return in, nil
}

// start makes the ingest, in place of what was there, without syncing it:
// losing it loses nothing that was promised.
func (in *Ingest) start() error {
	root, dir := in.store.root, layout.IngestPath(in.id)
	if err := root.RemoveAll(dir); err != nil {
		return err
	}
	if err := root.Mkdir(dir, 0o700); err != nil {
		return err
	}
	durable.At(layout.PointIngestOpened)
	data, err := json.Marshal(in.info)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInternal)
	}
	f, err := root.CreateFile(in.path(layout.IngestInfo), 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	in.file, err = root.AppendFile(in.path(layout.IngestData), 0o600)
	return err
}

// takeUp goes on behind what an earlier writer left. Whether the disk has it is
// for the disk to say: that writer may have ended by a sync that failed.
func (in *Ingest) takeUp(ctx context.Context, old layout.IngestRecord) (err error) {
	in.info.Started = old.Started
	if in.info.Expected == "" {
		in.info.Expected = old.Expected
	}
	if in.info.Total == 0 {
		in.info.Total = old.Total
	}
	if in.file, err = in.store.root.AppendFile(in.path(layout.IngestData), 0o600); err != nil {
		return err
	}
	if in.last, err = in.file.ModTime(); err != nil {
		return err
	}
	if err := in.file.Forget(); err != nil {
		return err
	}
	switch filled, err := in.file.Filled(); {
	case err != nil:
		return err
	case filled < in.file.Size():
		return in.Truncate(ctx, filled)
	}
	return in.rehash(ctx)
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

// Write appends p. Errors: ErrFailedPrecondition once it is sealed.
func (in *Ingest) Write(p []byte) (int, error) {
	if in.file == nil {
		return 0, fmt.Errorf("ingest %q is sealed: %w", in.info.Ref, errdefs.ErrFailedPrecondition)
	}
	if err := in.space.Write(in.ctx, int64(len(p))); err != nil {
		return 0, fmt.Errorf("ingest %q: %w", in.info.Ref, err)
	}
	n, err := in.file.Write(p)
	in.hash.Write(p[:n])
	in.last = time.Now().UTC()
	durable.At(layout.PointIngestPartial)
	if err == nil {
		err = in.store.wrote(n, in.last)
	}
	return n, err
}

// ReadAt reads what was written. It may run beside Write.
func (in *Ingest) ReadAt(p []byte, off int64) (int, error) { return in.file.ReadAt(p, off) }

// Truncate cuts the ingest to size bytes.
func (in *Ingest) Truncate(ctx context.Context, size int64) error {
	gone := in.file.Size() - size
	if err := in.file.Truncate(size); err != nil {
		return err
	}
	in.space.Unwrite(gone)
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
	file := in.file
	in.file, in.size = nil, rec.Size
	if err := file.Seal(barrier, blobPerm); err != nil {
		return layout.BlobMove{}, err
	}
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
	case in.info.Private && in.store.root.Poisoned() == nil:
		err = errors.Join(in.store.root.RemoveAll(layout.IngestPath(in.id)), in.file.Close())
	default:
		// The kernel's own time stamp is coarser than what Status has
		// told during the writing.
		err = errors.Join(in.file.SetModTime(in.last), in.file.Close())
	}
	in.store.unlock(in.id)
	in.space.Release() // what is left of it counts from here on by itself
	in.store = nil
	return err
}

// Discard throws the ingest away. In a poisoned store, which is not changed any
// more, it stays for the next writer.
func (in *Ingest) Discard() error {
	if in.store == nil || in.store.root.Poisoned() != nil {
		return in.Close()
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
