package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// image returns the record under a full name. Errors: ErrNotFound.
func (s *Store) image(ctx context.Context, name string) (layout.ImageRecord, error) {
	var rec layout.ImageRecord
	err := s.db.View(ctx, func(tx *metadata.Tx) (err error) {
		rec, err = tx.Images().Get(name)
		return err
	})
	if errors.Is(err, errdefs.ErrNotFound) {
		return rec, fmt.Errorf("no image %s in the store: %w", name, errdefs.ErrNotFound)
	}
	return rec, err
}

// Found is an image of the store, by name or id.
type Found struct {
	Target ocispec.Descriptor
	// Names are all full names of the target, sorted; Asked is the one that
	// it was found by, or "" for an id.
	Names []string
	Asked string
}

// Find looks up what a user wrote: a name, or the beginning of an id. An id
// is the digest of the target, of the manifest for this machine, or of the
// config, which docker shows.
//
// Errors: ErrNotFound; ErrInvalidArgument for what is neither, and for an id
// that more than one image has.
func (s *Store) Find(ctx context.Context, what string) (Found, error) {
	ref, nameErr := ParseRef(what)
	if nameErr == nil {
		rec, err := s.image(ctx, ref.String())
		if err == nil {
			names, err := s.namesOf(ctx, rec.Target)
			return Found{rec.Target, names, ref.String()}, err
		}
		if !errors.Is(err, errdefs.ErrNotFound) {
			return Found{}, err
		}
		if ref.Digest() != "" {
			return s.findDigest(ctx, ref)
		}
	}
	hex, ok := isID(what)
	switch {
	case ok:
		return s.findID(ctx, hex)
	case nameErr != nil:
		return Found{}, nameErr
	}
	return Found{}, fmt.Errorf("no image %s in the store: %w", ref.Familiar(), errdefs.ErrNotFound)
}

// findDigest finds an image that was pulled by a tag of the repository and has
// the digest: what a Dockerfile's FROM is once it was resolved.
func (s *Store) findDigest(ctx context.Context, ref Ref) (Found, error) {
	var found Found
	err := s.each(ctx, func(name string, rec layout.ImageRecord) error {
		if rec.Target.Digest != ref.Digest() {
			return nil
		}
		if named, err := ParseRef(name); err == nil && named.Repository() == ref.Repository() {
			found.Target, found.Names = rec.Target, append(found.Names, name)
		}
		return nil
	})
	if err == nil && len(found.Names) == 0 {
		err = fmt.Errorf("no image %s in the store: %w", ref.Familiar(), errdefs.ErrNotFound)
	}
	return found, err
}

func (s *Store) findID(ctx context.Context, hex string) (Found, error) {
	targets := map[string]Found{}
	err := s.each(ctx, func(name string, rec layout.ImageRecord) error {
		d := rec.Target.Digest
		if f, ok := targets[d.String()]; ok {
			f.Names = append(f.Names, name)
			targets[d.String()] = f
			return nil
		}
		if !strings.HasPrefix(d.Encoded(), hex) {
			p, err := s.localPick(ctx, rec.Target)
			if err != nil || (!strings.HasPrefix(p.config.Digest.Encoded(), hex) && !strings.HasPrefix(p.manifest.Digest.Encoded(), hex)) {
				return nil // a damaged image is fsck's to report
			}
		}
		targets[d.String()] = Found{Target: rec.Target, Names: []string{name}}
		return nil
	})
	switch {
	case err != nil:
		return Found{}, err
	case len(targets) == 0:
		return Found{}, fmt.Errorf("no image with the id %s in the store: %w", hex, errdefs.ErrNotFound)
	case len(targets) > 1:
		return Found{}, fmt.Errorf("%d images have an id that begins with %s: %w", len(targets), hex, errdefs.ErrInvalidArgument)
	}
	for _, f := range targets {
		return f, nil
	}
	return Found{}, nil
}

// each calls fn for every name, in order, outside any transaction. When ctx
// ends meanwhile that is the error: what fn could not read then may be sound.
func (s *Store) each(ctx context.Context, fn func(string, layout.ImageRecord) error) error {
	type row struct {
		name string
		rec  layout.ImageRecord
	}
	var rows []row
	err := s.db.View(ctx, func(tx *metadata.Tx) error {
		rows = rows[:0]
		return tx.Images().Each("", func(name string, rec layout.ImageRecord) error {
			rows = append(rows, row{name, rec})
			return nil
		})
	})
	if err != nil {
		return err
	}
	for _, r := range rows {
		if err := fn(r.name, r.rec); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (s *Store) namesOf(ctx context.Context, target ocispec.Descriptor) (names []string, err error) {
	err = s.each(ctx, func(name string, rec layout.ImageRecord) error {
		if rec.Target.Digest == target.Digest {
			names = append(names, name)
		}
		return nil
	})
	return names, err
}

// touchEvery is how exact the time of an image's last use is.
const touchEvery = time.Minute

// Touch notes that an image is used, by one of its full names; "" is none.
func (s *Store) Touch(ctx context.Context, name string) error {
	now := time.Now().UTC()
	rec, err := s.image(ctx, name)
	if errors.Is(err, errdefs.ErrNotFound) || err == nil && now.Sub(rec.LastUse()) < touchEvery {
		return nil
	}
	if err != nil {
		return err
	}
	return s.db.Update(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Images().Get(name)
		if errors.Is(err, errdefs.ErrNotFound) {
			return nil // removed meanwhile
		}
		rec.Used = now
		return errors.Join(err, tx.Images().Put(name, rec))
	})
}

// Tag gives the image that source names (a name or an id) one more name,
// taking it from whatever had it. Errors: ErrNotFound, ErrInvalidArgument for
// a name with a digest.
func (s *Store) Tag(ctx context.Context, source string, name Ref) error {
	if name.Digest() != "" {
		return fmt.Errorf("tag %s: a name with a digest cannot be given: %w", name.Familiar(), errdefs.ErrInvalidArgument)
	}
	found, err := s.Find(ctx, source)
	if err != nil {
		return err
	}
	now := time.Now().UTC()
	err = s.db.Update(ctx, func(tx *metadata.Tx) error {
		// Found outside this transaction, so it may be gone by now.
		if !tx.Blobs().Has(layout.BlobDigest(found.Target.Digest)) {
			return fmt.Errorf("no image %s in the store: %w", source, errdefs.ErrNotFound)
		}
		return tx.PutImage(name.String(), layout.ImageRecord{Target: found.Target, Created: now, Updated: now})
	})
	s.journal.Kick()
	return err
}

// Removed tells what a removal took away.
type Removed struct {
	Untagged []string // full names
	// Targets have no name left: their blobs and trees go, as far as nothing
	// else needs them.
	Targets []digest.Digest
}

// Remove takes a name away, or with an id all names of the image. What nothing
// else needs goes with the last one, in the background: the call does not wait
// for files. Without force an id of more than one name is refused.
//
// Errors: ErrNotFound, ErrInvalidArgument, ErrFailedPrecondition.
func (s *Store) Remove(ctx context.Context, what string, force bool) (Removed, error) {
	found, err := s.Find(ctx, what)
	if err != nil {
		return Removed{}, err
	}
	names := found.Names
	if found.Asked != "" {
		names = []string{found.Asked}
	} else if len(names) > 1 && !force {
		return Removed{}, fmt.Errorf("image %s has %d names (%s), remove them or use force: %w", what, len(names), strings.Join(names, ", "), errdefs.ErrFailedPrecondition)
	}
	gone, err := s.removeNames(ctx, what, names, found.Target.Digest)
	if err != nil {
		return Removed{}, err
	}
	removed := Removed{Untagged: gone}
	if len(slices.DeleteFunc(slices.Clone(found.Names), func(n string) bool { return slices.Contains(gone, n) })) == 0 {
		removed.Targets = []digest.Digest{found.Target.Digest}
	}
	return removed, nil
}

// removeNames takes names away that stand for target, in one transaction, and
// returns those that did. what is for errors.
func (s *Store) removeNames(ctx context.Context, what string, names []string, target digest.Digest) (gone []string, err error) {
	err = s.db.Update(ctx, func(tx *metadata.Tx) error {
		gone = nil
		for _, name := range names {
			rec, err := tx.Images().Get(name)
			if errors.Is(err, errdefs.ErrNotFound) || (err == nil && rec.Target.Digest != target) {
				continue // somebody else removed or moved it meanwhile
			}
			if err := errors.Join(err, tx.Drop(layout.ImageNode(name))); err != nil {
				return err
			}
			gone = append(gone, name)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("remove image %s: %w", what, err)
	}
	s.journal.Kick()
	return gone, nil
}
