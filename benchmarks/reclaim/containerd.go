package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"varve.dev/internal/testkit"
)

type containerdEngine struct {
	process
	made int
}

func (e *containerdEngine) name() string { return "containerd" }

func (e *containerdEngine) start(ctx context.Context, dir string) error {
	config := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n", dir+"/root", dir+"/state", dir+"/sock")
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600); err != nil {
		return err
	}
	return e.run(ctx, dir, filepath.Join(dir, "sock"), "containerd", "--config", filepath.Join(dir, "config.toml"), "-l", "error")
}

func (e *containerdEngine) ctr(ctx context.Context, in io.Reader, args ...string) error {
	_, err := output(ctx, in, append([]string{"ctr", "--address", filepath.Join(e.dir, "sock")}, args...)...)
	return err
}

// load gives the image no other name than the archive's: it would have both, and
// go with neither.
func (e *containerdEngine) load(ctx context.Context, img testkit.Image) (string, error) {
	archive := img.Archive()
	defer archive.Close()
	return img.Name, e.ctr(ctx, archive, "images", "import", "-")
}

func (e *containerdEngine) removals() []removal {
	rm := func(args ...string) func(context.Context, string) error {
		return func(ctx context.Context, image string) error {
			return e.ctr(ctx, nil, append(append([]string{"images", "rm"}, args...), image)...)
		}
	}
	return []removal{{"rm", rm()}, {"rm --sync", rm("--sync")}}
}

func (e *containerdEngine) create(ctx context.Context, image string) (func() error, error) {
	e.made++
	id := fmt.Sprintf("c%d", e.made)
	return func() error { return e.ctr(ctx, nil, "containers", "rm", id) }, e.ctr(ctx, nil, "containers", "create", image, id, "true")
}

// uppers are of all snapshots but the image's, which is the first and has files.
func (e *containerdEngine) uppers(context.Context) (dirs []string, err error) {
	all, err := filepath.Glob(filepath.Join(e.dir, "root", "io.containerd.snapshotter.v1.overlayfs", "snapshots", "*", "fs"))
	for _, dir := range all {
		if entries, rerr := os.ReadDir(dir); rerr == nil && len(entries) == 0 {
			dirs = append(dirs, dir)
		}
	}
	return dirs, err
}

// usage has no totals in containerd: this is what there is.
func (e *containerdEngine) usage(ctx context.Context, _ bool) error {
	return e.ctr(ctx, nil, "snapshots", "usage")
}
