package image

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"varve.dev/errdefs"
)

// Prune says which images are to go.
type Prune struct {
	// Named removes images with names, too; else only those without.
	Named bool
	// Before spares images that were made after it; zero: none are spared.
	Before time.Time
	// Spare tells of an image that somebody uses; Match of its labels, whether
	// they are those asked for. May be nil.
	Spare func(target digest.Digest, names []string) bool
	Match func(labels map[string]string) bool
	// Progress is told of what has gone so far. May be nil.
	Progress func(Removed)
}

// NoName begins the names of images that have none of their own.
const NoName = "<none>@"

// Prune removes images that nobody uses, one after the other: others work
// meanwhile, and ctx ends it between two. What only they needed goes in the
// background. An image whose documents cannot be read stays, if it is asked what
// they say.
func (s *Store) Prune(ctx context.Context, p Prune) (all Removed, err error) {
	list, err := s.List(ctx)
	if err != nil {
		return all, err
	}
	for _, sum := range list {
		if err := ctx.Err(); err != nil {
			return all, err
		}
		if ok, err := s.prunable(ctx, p, sum); err != nil || !ok {
			if err != nil {
				return all, err
			}
			continue
		}
		removed, err := s.removeNames(ctx, sum.Target.Digest.String(), sum.Names, sum.Target.Digest)
		if err != nil {
			return all, err
		}
		all.Untagged = append(all.Untagged, removed...)
		all.Targets = append(all.Targets, sum.Target.Digest)
		if p.Progress != nil {
			p.Progress(all)
		}
	}
	return all, nil
}

func (s *Store) prunable(ctx context.Context, p Prune, sum Summary) (bool, error) {
	for _, name := range sum.Names {
		if !p.Named && !strings.HasPrefix(name, NoName) {
			return false, nil
		}
	}
	asked := !p.Before.IsZero() || p.Match != nil
	switch {
	case p.Spare != nil && p.Spare(sum.Target.Digest, sum.Names), asked && sum.Err != nil:
		return false, nil
	case !p.Before.IsZero() && !sum.Created.Before(p.Before):
		return false, nil
	case p.Match == nil:
		return true, nil
	}
	d, err := s.Inspect(ctx, sum.Names[0])
	if errors.Is(err, errdefs.ErrNotFound) || errdefs.AsCorrupt(err) != nil {
		return false, nil
	}
	return err == nil && p.Match(d.Image.Config.Labels), err
}
