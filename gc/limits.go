package gc

import (
	"fmt"
	"path"
	"slices"
	"time"

	"github.com/distribution/reference"

	"varve.dev/errdefs"
)

// Limits are what a store may take. Zero values do not limit.
type Limits struct {
	// Size is the most bytes that the store takes of the disk, with its
	// metadata, with what is being written and with what is being deleted.
	Size int64
	// Free is what stays free on the store's file system for others.
	Free int64
	// Cache is the most bytes that are there for the build cache alone:
	// results that no image or container needs, and cache mounts. What running
	// builds hold comes on top.
	Cache int64
	// CacheAge is how long a build result is kept that is not used.
	CacheAge time.Duration
	// Retain says what becomes of blobs whose layers are unpacked and that a
	// registry can serve again.
	Retain Retain
	// Images says whether images go that no container stands on, for want of
	// space.
	Images Images
	// Pins are patterns, as path.Match has them, of the names of images that
	// neither want of space nor a prune removes. A name may be written in full
	// or as docker shows it, with its tag or without: "debian:*".
	Pins []string
	// Downloads is how long a download that was cut off waits to be gone on
	// with; 0: a week.
	Downloads time.Duration
}

// Retain is what is kept of blobs that can be had again.
type Retain string

// The ways to retain blobs. Without them a push of the image makes other blobs
// of the same files, or fetches them.
const (
	// RetainReferenced keeps them until space is short, which is the default.
	RetainReferenced Retain = "referenced"
	// RetainAll keeps them even then.
	RetainAll Retain = "all"
	// RetainMinimal drops them once their layers are unpacked.
	RetainMinimal Retain = "minimal"
)

// Images is what becomes of images when space is short.
type Images string

// The ways to keep images.
const (
	KeepImages  Images = "keep"  // they are the users' to remove, which is the default
	EvictImages Images = "evict" // the longest unused go, as in a cache
)

// defaultDownloads is the age of forgotten downloads.
const defaultDownloads = 7 * 24 * time.Hour

func (l Limits) downloads() time.Duration {
	if l.Downloads > 0 {
		return l.Downloads
	}
	return defaultDownloads
}

// Pinned tells whether an image is pinned, by its full name.
func (l Limits) Pinned(name string) bool {
	if len(l.Pins) == 0 {
		return false
	}
	ways := []string{name}
	if ref, err := reference.ParseNormalizedNamed(name); err == nil {
		ways = append(ways, ref.Name(), reference.FamiliarString(ref), reference.FamiliarName(ref))
	}
	return slices.ContainsFunc(l.Pins, func(pattern string) bool {
		return slices.ContainsFunc(ways, func(way string) bool {
			ok, _ := path.Match(pattern, way)
			return ok
		})
	})
}

// Check refuses limits that make no sense. Errors: ErrInvalidArgument.
func (l Limits) Check() error {
	for name, n := range map[string]int64{"size": l.Size, "free": l.Free, "cache": l.Cache, "cache age": int64(l.CacheAge), "age of downloads": int64(l.Downloads)} {
		if n < 0 {
			return fmt.Errorf("limit %s is %d, less than nothing: %w", name, n, errdefs.ErrInvalidArgument)
		}
	}
	switch l.Images {
	case "", KeepImages, EvictImages:
	default:
		return fmt.Errorf("limit images is %q, not keep or evict: %w", l.Images, errdefs.ErrInvalidArgument)
	}
	for _, p := range l.Pins {
		if _, err := path.Match(p, ""); err != nil {
			return fmt.Errorf("limit pins: %q is no pattern: %w", p, errdefs.ErrInvalidArgument)
		}
	}
	switch l.Retain {
	case "", RetainReferenced, RetainAll, RetainMinimal:
		return nil
	}
	return fmt.Errorf("limit retain is %q, not all, referenced or minimal: %w", l.Retain, errdefs.ErrInvalidArgument)
}
