package varve

import (
	"context"
	"strings"
	"time"
)

// Space is what the store takes of its disk, and how it is given back.
type Space interface {
	// DiskUsage costs the same whatever the store holds, unless Verbose asks
	// for everything one by one.
	DiskUsage(ctx context.Context, req DiskUsageRequest) (DiskUsage, error)
	// Collect brings the store within limits, and waits until the files are
	// deleted.
	Collect(ctx context.Context, req CollectRequest) (Collected, error)
	// Prune removes what nobody uses. It ends within a second of ctx; what it
	// had removed by then stays removed.
	Prune(ctx context.Context, req PruneRequest, progress func(Event)) (Pruned, error)
}

// DiskUsageRequest asks what the store takes.
type DiskUsageRequest struct {
	Verbose bool `json:"verbose,omitempty"` // also one by one
	Measure bool `json:"measure,omitempty"` // look at everything that is measured now, however long it takes
}

// Usage is a number of things and what they take of the disk.
type Usage struct {
	Count       int64 `json:"count"`
	Bytes       int64 `json:"bytes"` // in blocks of 4 KiB
	Inodes      int64 `json:"inodes"`
	Reclaimable int64 `json:"reclaimable"` // bytes that a prune of it would give back
}

// DiskUsage is what the store takes of its disk. The parts add up to Total.
type DiskUsage struct {
	// Images are the blobs and layers that images or containers need, and
	// Cache those that only build results do, or operations under way.
	Images      Usage `json:"images"`
	Cache       Usage `json:"cache"`
	CacheMounts Usage `json:"cacheMounts"`
	// Containers are their writable layers, configurations and logs, and the
	// writable layers of steps that run; these, volumes, cache mounts and what
	// is in quarantine are measured from time to time.
	Containers Usage `json:"containers"`
	Volumes    Usage `json:"volumes"`
	Quarantine Usage `json:"quarantine"`
	Trash      Usage `json:"trash"` // removed, and being deleted
	Metadata   int64 `json:"metadata"`
	Fixed      int64 `json:"fixed"`      // directories of an empty store
	Unfinished int64 `json:"unfinished"` // downloads that were cut off
	InFlight   int64 `json:"inFlight"`   // set aside for operations under way
	Total      int64 `json:"total"`
	Free       int64 `json:"free"` // on the file system
	// Again is how much of Images are blobs that a registry can serve again.
	// Only when asked for one by one.
	Again int64 `json:"again,omitempty"`

	// One by one.
	EachImage     []ImageUsage  `json:"eachImage,omitempty"`
	EachContainer []DirUsage    `json:"eachContainer,omitempty"`
	EachMount     []DirUsage    `json:"eachMount,omitempty"`
	EachResult    []ResultUsage `json:"eachResult,omitempty"`
}

// ImageUsage is what an image takes.
type ImageUsage struct {
	Names   []string  `json:"names"`
	Digest  string    `json:"digest"`
	Created time.Time `json:"created"`
	Bytes   int64     `json:"bytes"`  // of all that it needs
	Unique  int64     `json:"unique"` // of what no other image needs
	Shared  int64     `json:"shared"`
	InUse   int       `json:"inUse"` // containers that stand on it
}

// DirUsage is what a directory took when it was measured.
type DirUsage struct {
	ID     string    `json:"id"`
	Name   string    `json:"name,omitempty"`
	Bytes  int64     `json:"bytes"`
	Inodes int64     `json:"inodes"`
	When   time.Time `json:"when,omitzero"` // zero: never measured
}

// ResultUsage is what a build result takes, without what it stands on.
type ResultUsage struct {
	Key         string    `json:"key"`
	Description string    `json:"description"`
	Bytes       int64     `json:"bytes"`
	Created     time.Time `json:"created"`
	LastUse     time.Time `json:"lastUse"`
	Uses        int64     `json:"uses"`
	InUse       bool      `json:"inUse"` // an image, a container, a build or another result stands on it
}

// CollectRequest asks for a collection. The limits replace those of the store's
// configuration for this once; nil leaves one as it is.
type CollectRequest struct {
	Size      *int64         `json:"size,omitempty"`
	Free      *int64         `json:"free,omitempty"`
	Cache     *int64         `json:"cache,omitempty"`
	CacheAge  *time.Duration `json:"cacheAge,omitempty"`
	Downloads *time.Duration `json:"downloads,omitempty"`
	Retain    string         `json:"retain,omitempty"` // all, referenced, minimal
}

// Collected says what a collection did.
type Collected struct {
	Before int64 `json:"before"` // bytes that the store took
	After  int64 `json:"after"`
	Leases int   `json:"leases"` // that had expired
}

// PruneRequest asks for the removal of what nobody uses.
type PruneRequest struct {
	Images     bool `json:"images,omitempty"`
	Containers bool `json:"containers,omitempty"`
	Builder    bool `json:"builder,omitempty"`
	// All removes images that have names too, unless a container stands on
	// them; else only those without.
	All bool `json:"all,omitempty"`
	// Until spares what was made, or of build results used, after this.
	Until time.Time `json:"until,omitzero"`
	// Labels are KEY or KEY=VALUE that an image or a container must have, and
	// NotLabels those that it must not.
	Labels    []string `json:"labels,omitempty"`
	NotLabels []string `json:"notLabels,omitempty"`
	// Keep is how many bytes of build results stay.
	Keep int64 `json:"keep,omitempty"`
}

// Pruned says what a prune removed.
type Pruned struct {
	Containers []string `json:"containers,omitempty"`
	Untagged   []string `json:"untagged,omitempty"`
	Deleted    []string `json:"deleted,omitempty"` // digests of images
	Results    int      `json:"results"`
	Mounts     int      `json:"mounts"`
	Bytes      int64    `json:"bytes"` // that are given back
}

// Match returns what tells whether labels are those asked for; nil if none are.
func (r PruneRequest) Match() func(labels map[string]string) bool {
	if len(r.Labels) == 0 && len(r.NotLabels) == 0 {
		return nil
	}
	has := func(labels map[string]string, want string) bool {
		key, value, exact := strings.Cut(want, "=")
		got, ok := labels[key]
		return ok && (!exact || got == value)
	}
	return func(labels map[string]string) bool {
		for _, l := range r.Labels {
			if !has(labels, l) {
				return false
			}
		}
		for _, l := range r.NotLabels {
			if has(labels, l) {
				return false
			}
		}
		return true
	}
}
