package image

import (
	"context"
	"fmt"

	"github.com/containerd/platforms"
)

// Unpack unpacks an image that has its blobs in the store and no trees, as one
// has whose database was lost, or whose layers were rewritten. what and platform
// are as in [Store.InspectFor]. One that is unpacked already is left as it is.
// Errors: ErrNotFound for a blob that is not here.
func (s *Store) Unpack(ctx context.Context, what string, platform platforms.MatchComparer) error {
	found, err := s.Find(ctx, what)
	if err != nil {
		return err
	}
	p, err := s.pickFor(ctx, found.Target, platform)
	if err != nil {
		return err
	}
	if top, err := s.snapshotOf(ctx, p.manifest); err != nil || top != "" {
		return err
	}
	a, err := s.assemble(ctx, fmt.Sprintf("unpack %s", what), "", p.blobs())
	if err != nil {
		return err
	}
	if err := a.layers(ctx, p, absent, defaultParallel, nil); err != nil {
		return a.abandon(fmt.Errorf("unpack %s: %w", what, err))
	}
	return a.publish(ctx, nil, nil)
}
