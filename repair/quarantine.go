package repair

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Quarantined is what one repair took out of the store. It stays until
// [Repairer.Discard]: nothing is deleted for being damaged.
type Quarantined struct {
	ID    string                  `json:"id"`
	Bytes int64                   `json:"bytes"` // on the disk
	Note  layout.QuarantineRecord `json:"note"`  // zero if it cannot be read
}

// Quarantine lists what repairs took out of the store, the oldest first.
func (r *Repairer) Quarantine(ctx context.Context) (list []Quarantined, err error) {
	entries, err := os.ReadDir(r.Root.Path(layout.QuarantineDir))
	if err != nil {
		return nil, fmt.Errorf("quarantine: %w: %w", err, errdefs.ErrUnavailable)
	}
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		q := Quarantined{ID: e.Name()}
		dir := r.Root.Path(layout.QuarantinePath(e.Name()))
		if data, err := os.ReadFile(filepath.Join(dir, layout.QuarantineNote)); err == nil {
			_ = json.Unmarshal(data, &q.Note)
		}
		if q.Bytes, err = sizeOf(dir); err != nil {
			return nil, fmt.Errorf("quarantine: %w: %w", err, errdefs.ErrUnavailable)
		}
		list = append(list, q)
	}
	slices.SortStableFunc(list, func(a, b Quarantined) int { return a.Note.When.Compare(b.Note.When) })
	return list, nil
}

// sizeOf is what a directory takes of the disk; what vanishes meanwhile does
// not count.
func sizeOf(dir string) (bytes int64, err error) {
	err = filepath.WalkDir(dir, func(name string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(name, &st)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		bytes += st.Blocks * 512
		return err
	})
	return bytes, err
}

// Discard deletes what was taken out of the store, by id. Errors: ErrUnavailable
// during a repair; ErrNotFound, for the first that is not there, before anything
// is deleted.
func (r *Repairer) Discard(ctx context.Context, ids []string) error {
	if !r.one.TryLock() { // it may be filling its place
		return fmt.Errorf("quarantine: a repair is under way: %w", errdefs.ErrUnavailable)
	}
	defer r.one.Unlock()
	for _, id := range ids {
		if !layout.IsElement(id) {
			return fmt.Errorf("quarantine %q: %w", id, errdefs.ErrNotFound)
		}
		if _, err := os.Lstat(r.Root.Path(layout.QuarantinePath(id))); err != nil {
			return fmt.Errorf("quarantine %q: %w: %w", id, err, errdefs.ErrNotFound)
		}
	}
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.Root.RemoveAll(layout.QuarantinePath(id)); err != nil {
			return err
		}
	}
	return r.Root.SyncDirs(layout.QuarantineDir)
}
