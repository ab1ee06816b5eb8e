package containers

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/runtime"
)

// Prune says which containers are to go.
type Prune struct {
	// Before spares those that were made after it; zero: none are spared.
	Before time.Time
	// Match tells of a container's labels, which are those of its image,
	// whether they are those asked for. May be nil.
	Match func(labels map[string]string) bool
	// Progress is told of each that went. May be nil.
	Progress func(layout.ContainerID)
}

// startTime is how long a container that never ran is taken for one that is
// about to.
const startTime = time.Minute

// Prune removes containers that do not run, one after the other; ctx ends it
// between two.
func (s *Store) Prune(ctx context.Context, p Prune) (gone []layout.ContainerID, err error) {
	all := map[layout.ContainerID]layout.ContainerRecord{}
	err = s.db.View(ctx, func(tx *metadata.Tx) error {
		return tx.Containers().Each("", func(id layout.ContainerID, rec layout.ContainerRecord) error {
			all[id] = rec
			return nil
		})
	})
	for id, rec := range all {
		if err != nil || ctx.Err() != nil {
			break
		}
		if !s.prunable(p, id, rec) {
			continue
		}
		switch rerr := s.Remove(ctx, id); {
		case rerr == nil:
			gone = append(gone, id)
			if p.Progress != nil {
				p.Progress(id)
			}
		case errors.Is(rerr, errdefs.ErrFailedPrecondition), errors.Is(rerr, errdefs.ErrNotFound): // it runs, or is gone
		default:
			err = rerr
		}
	}
	return gone, errors.Join(err, ctx.Err())
}

func (s *Store) prunable(p Prune, id layout.ContainerID, rec layout.ContainerRecord) bool {
	if !p.Before.IsZero() && !rec.Created.Before(p.Before) {
		return false
	}
	dir := s.root.Path(layout.ContainerPath(id))
	if _, err := os.Lstat(path.Join(dir, runtime.ExitFile)); err != nil && time.Since(rec.Created) < startTime {
		return false
	}
	return p.Match == nil || p.Match(labelsOf(dir))
}

// labelsOf are the labels of the image that a container stands on, as it was.
func labelsOf(dir string) map[string]string {
	data, err := os.ReadFile(path.Join(dir, layout.ContainerImage))
	var image ocispec.Image
	if err != nil || json.Unmarshal(data, &image) != nil {
		return nil
	}
	return image.Config.Labels
}
