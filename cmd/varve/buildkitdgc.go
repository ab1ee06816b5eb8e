package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/util/disk"

	"varve.dev/errdefs"
	"varve.dev/gc"
)

// buildkitdGC is what buildkitd.toml says of the build cache's size.
type buildkitdGC struct {
	GC          *bool     `toml:"gc"`
	KeepStorage diskSpace `toml:"gckeepstorage"` // the name of Reserved in old files
	buildkitdSpace
	Policies []struct {
		buildkitdSpace
		Filters      []string  `toml:"filters"`
		KeepDuration keepFor   `toml:"keepDuration"`
		KeepBytes    diskSpace `toml:"keepBytes"` // as KeepStorage
	} `toml:"gcpolicy"`
}

type buildkitdSpace struct {
	MaxUsed  diskSpace `toml:"maxUsedSpace"`
	Reserved diskSpace `toml:"reservedSpace"`
	MinFree  diskSpace `toml:"minFreeSpace"`
}

// limits are what the settings come to on the file system of root: limits of the
// build cache, which is what buildkitd has. Of policies that are about some kinds
// of records alone nothing is taken over: this cache goes by what was not used for
// long, whatever it is.
func (c buildkitdGC) limits(root string) (l gc.Limits, err error) {
	if c.GC != nil && !*c.GC {
		return l, nil
	}
	d, err := statDisk(root)
	if err != nil {
		return l, fmt.Errorf("disk of %s: %w: %w", root, err, errdefs.ErrUnavailable)
	}
	if len(c.Policies) == 0 {
		c.narrow(&l, d, c.KeepStorage, 0)
		if l.Cache == 0 && l.Free == 0 {
			l.Cache = unasked(d)
		}
	}
	for _, p := range c.Policies {
		if len(p.Filters) == 0 {
			p.narrow(&l, d, p.KeepBytes, time.Duration(p.KeepDuration))
		}
	}
	return l, nil
}

// narrow makes limits narrower. What is reserved is kept, whatever the most is that
// may be used.
func (s buildkitdSpace) narrow(l *gc.Limits, d disk.DiskStat, reserved diskSpace, age time.Duration) {
	keep := max(s.MaxUsed.on(d), s.Reserved.on(d), reserved.on(d))
	l.Free = max(l.Free, s.MinFree.on(d))
	switch {
	case age > 0 && keep == 0 && (l.CacheAge == 0 || age < l.CacheAge):
		l.CacheAge = age
	case age == 0 && keep > 0 && (l.Cache == 0 || keep < l.Cache):
		l.Cache = keep
	}
}

// unasked is the cap that buildkitd gives itself where nothing is said. The share of
// the disk that it then tries to leave free is not taken over: here it would end
// builds, where buildkitd goes on.
func unasked(d disk.DiskStat) int64 { return min(diskSpace{percent: 60}.on(d), 100e9) }

// statDisk asks for the disk of a directory that may not be there yet.
func statDisk(dir string) (disk.DiskStat, error) {
	d, err := disk.GetDiskStat(dir)
	if parent := filepath.Dir(dir); errors.Is(err, fs.ErrNotExist) && parent != dir {
		return statDisk(parent)
	}
	return d, err
}

// diskSpace is a number of bytes, "10GB" (of 1024), or a share of a disk, "10%".
type diskSpace struct{ bytes, percent int64 }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *diskSpace) UnmarshalText(text []byte) (err error) {
	if share, ok := strings.CutSuffix(string(text), "%"); ok {
		s.percent, err = strconv.ParseInt(share, 10, 64)
		return err
	}
	s.bytes, err = units.RAMInBytes(string(text))
	return err
}

// on returns bytes; shares are the next full number of GB, as in buildkitd.
func (s diskSpace) on(d disk.DiskStat) int64 {
	if s.percent == 0 {
		return s.bytes
	}
	return (d.Total*s.percent/100>>30 + 1) * 1e9
}

// keepFor is a duration, or a number of seconds.
type keepFor time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (k *keepFor) UnmarshalText(text []byte) error {
	d, err := time.ParseDuration(string(text))
	if seconds, serr := strconv.ParseInt(string(text), 10, 64); serr == nil {
		d, err = time.Duration(seconds)*time.Second, nil
	}
	*k = keepFor(d)
	return err
}
