package image

import (
	"fmt"

	"github.com/containerd/platforms"

	"varve.dev/errdefs"
)

// ParsePlatform reads "linux/arm64/v8" into what Pull takes. "" is this
// machine.
func ParsePlatform(s string) (platforms.MatchComparer, error) {
	if s == "" {
		return hostPlatform(), nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return nil, fmt.Errorf("platform %q: %w: %w", s, err, errdefs.ErrInvalidArgument)
	}
	return platforms.OnlyStrict(p), nil
}
