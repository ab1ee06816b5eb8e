package repair

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"time"

	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/layout"
)

// place is the directory of one repair in quarantine.
type place struct {
	w    *work
	rel  string
	note layout.QuarantineRecord
	last int // number of the last name
	bad  int // names in it that were taken out of the store
}

// newPlace makes the directory for the repair of an object.
func (w *work) newPlace(object string, found []fsck.Finding, images []string) (*place, error) {
	p := &place{w: w, rel: layout.QuarantinePath(layout.NewID())}
	p.note = layout.QuarantineRecord{When: time.Now().UTC(), Object: object, Files: map[string]string{}, Images: images}
	for _, f := range found {
		p.note.Found = append(p.note.Found, fmt.Sprintf("%s %s: %s", f.Invariant, f.Path, f.Detail))
	}
	if err := w.Root.Mkdir(p.rel, 0o700); err != nil {
		return nil, err
	}
	if err := w.Root.SyncDirs(layout.QuarantineDir); err != nil {
		return nil, err
	}
	return p, p.save()
}

// name is a new name in the place, for what stands or is to stand at rel.
func (p *place) name(rel string) string {
	p.last++
	n := strconv.Itoa(p.last)
	p.note.Files[n] = rel
	return n
}

// find returns where in the store something is that was taken from rel; "" if
// it was not there.
func (p *place) find(rel string) string {
	for name, from := range p.note.Files {
		at := path.Join(p.rel, name)
		if fi, err := os.Lstat(p.w.Root.Path(at)); from == rel && err == nil && fi.Mode().IsRegular() {
			return at
		}
	}
	return ""
}

func (p *place) save() error {
	data, err := json.MarshalIndent(p.note, "", " ")
	if err != nil {
		return fmt.Errorf("quarantine: %w: %w", err, errdefs.ErrInternal)
	}
	return p.w.Root.WriteFile(path.Join(p.rel, layout.QuarantineNote), data, 0o600)
}

// close leaves the place if anything bad is in it, and removes it otherwise.
// It returns the directory that stays.
func (p *place) close() (string, error) {
	if p.bad == 0 {
		return "", p.w.Root.RemoveAll(p.rel)
	}
	return p.rel, p.save()
}

// keep copies a file of the store in, if it is there.
func (p *place) keep(rel string) error {
	if fi, err := os.Lstat(p.w.Root.Path(rel)); err != nil || !fi.Mode().IsRegular() {
		return nil
	}
	f, err := p.w.Root.CreateFile(path.Join(p.rel, p.name(rel)), 0o600)
	if err != nil {
		return err
	}
	p.bad++
	return errors.Join(p.w.copyOut(rel, f), f.Sync(), f.Close(), p.w.Root.SyncDirs(p.rel))
}

// take moves a whole file or directory of the store in, if it is there.
func (p *place) take(rel string) error {
	to := path.Join(p.rel, p.name(rel))
	err := p.w.Root.Rename(rel, to)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	p.bad++
	return p.w.Root.SyncNames(path.Dir(rel), p.rel)
}
