package main

import (
	"context"
	"fmt"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/errdefs"
	"varve.dev/gc"
)

// gcConfig is what the store may take of its disk. Sizes are such as "10GB".
type gcConfig struct {
	Size      string   `toml:"size"`      // of everything in the store, with what is on its way; default: no limit
	Free      string   `toml:"free"`      // that stays free on its file system; default: 0
	Cache     string   `toml:"cache"`     // of what is there for the build cache alone; default: no limit
	CacheAge  string   `toml:"cache_age"` // of a build result that is not used, such as "720h"; default: no limit
	Retain    string   `toml:"retain"`    // of blobs that a registry can serve again: all, referenced (default), minimal
	Downloads string   `toml:"downloads"` // how long one that was cut off waits, such as "24h"; default: a week
	Images    string   `toml:"images"`    // that no container stands on, when space is short: keep (default), evict
	Pins      []string `toml:"pins"`      // patterns of names of images that neither want of space nor a prune removes
}

func (c gcConfig) limits() (l gc.Limits, err error) {
	l = gc.Limits{Retain: gc.Retain(c.Retain), Images: gc.Images(c.Images), Pins: c.Pins}
	for _, f := range []struct {
		name, text string
		into       *int64
	}{{"gc.size", c.Size, &l.Size}, {"gc.free", c.Free, &l.Free}, {"gc.cache", c.Cache, &l.Cache}} {
		if *f.into, err = byteSize(f.name, f.text); err != nil {
			return l, err
		}
	}
	for _, f := range []struct {
		name, text string
		into       *time.Duration
	}{{"gc.cache_age", c.CacheAge, &l.CacheAge}, {"gc.downloads", c.Downloads, &l.Downloads}} {
		if *f.into, err = age(f.name, f.text); err != nil {
			return l, err
		}
	}
	return l, l.Check()
}

// byteSize reads a size; "" is 0.
func byteSize(what, text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	n, err := units.FromHumanSize(text)
	if err != nil {
		return 0, fmt.Errorf("%s: %q is no size such as 10GB: %w", what, text, errdefs.ErrInvalidArgument)
	}
	return n, nil
}

// age reads a duration; "" is 0.
func age(what, text string) (time.Duration, error) {
	if text == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return 0, fmt.Errorf("%s: %q is no duration such as 24h: %w", what, text, errdefs.ErrInvalidArgument)
	}
	return d, nil
}

func newGC(g *globals) *cobra.Command {
	var size, free, cache, cacheAge, downloads, retain string
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Bring the store within its limits, and delete what was removed",
		Long: "Bring the store within its limits, or those given here for this once, and wait until what was removed is deleted.\n" +
			"What goes: downloads that were cut off, blobs that a registry can serve again, build results by their last use.\n" +
			"Images, containers and what is in use never do: see prune.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req := varve.CollectRequest{Retain: retain}
			for name, f := range map[string]struct {
				text string
				into **int64
			}{"size": {size, &req.Size}, "free": {free, &req.Free}, "cache": {cache, &req.Cache}} {
				if !cmd.Flags().Changed(name) {
					continue
				}
				n, err := byteSize("--"+name, f.text)
				if err != nil {
					return err
				}
				*f.into = &n
			}
			for name, f := range map[string]struct {
				text string
				into **time.Duration
			}{"cache-age": {cacheAge, &req.CacheAge}, "downloads": {downloads, &req.Downloads}} {
				if !cmd.Flags().Changed(name) {
					continue
				}
				d, err := age("--"+name, f.text)
				if err != nil {
					return err
				}
				*f.into = &d
			}
			return g.with(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				done, err := j.Collect(ctx, req)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "The store takes %s, %s less than before.\n", humanSize(done.After), humanSize(max(0, done.Before-done.After)))
				return err
			})
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&size, "size", "", "most bytes of everything, such as 50GB; 0: no limit")
	fl.StringVar(&free, "free", "", "bytes that stay free on the file system")
	fl.StringVar(&cache, "cache", "", "most bytes of the build cache alone")
	fl.StringVar(&cacheAge, "cache-age", "", "age of unused build results, such as 720h")
	fl.StringVar(&downloads, "downloads", "", "age of downloads that were cut off")
	fl.StringVar(&retain, "retain", "", "blobs that a registry can serve again: all, referenced, minimal")
	return cmd
}

// humanSize writes a number of bytes as docker does.
func humanSize(n int64) string { return units.HumanSizeWithPrecision(float64(n), 4) }
