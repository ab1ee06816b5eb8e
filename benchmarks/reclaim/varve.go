package main

import (
	"context"
	"io"
	"path/filepath"
	"strings"

	"varve.dev/api/varve"
	"varve.dev/internal/testkit"
)

type varveEngine struct {
	process
	command string
	client  *varve.Client
}

func (e *varveEngine) name() string { return "varve" }

func (e *varveEngine) start(ctx context.Context, dir string) error {
	socket := filepath.Join(dir, "state", "varve.sock")
	e.client = varve.NewClient(socket)
	return e.run(ctx, dir, socket, e.command, "--root", filepath.Join(dir, "root"), "--state", filepath.Join(dir, "state"), "daemon")
}

func (e *varveEngine) cli(ctx context.Context, in io.Reader, args ...string) error {
	_, err := output(ctx, in, append([]string{e.command, "--root", filepath.Join(e.dir, "root"), "--state", filepath.Join(e.dir, "state")}, args...)...)
	return err
}

func (e *varveEngine) load(ctx context.Context, img testkit.Image) (string, error) {
	archive := img.Archive()
	defer archive.Close()
	return img.Name, e.cli(ctx, archive, "load")
}

// removals: the second has somebody wait for the space, which ends the pacing.
func (e *varveEngine) removals() []removal {
	rmi := func(ctx context.Context, image string) error { return e.cli(ctx, nil, "rmi", image) }
	return []removal{{"rmi", rmi}, {"rmi, gc", func(ctx context.Context, image string) error {
		if err := rmi(ctx, image); err != nil {
			return err
		}
		return e.cli(ctx, nil, "gc")
	}}}
}

func (e *varveEngine) create(ctx context.Context, image string) (func() error, error) {
	c, err := e.client.Create(ctx, varve.CreateRequest{Image: image, Command: []string{"true"}, Network: "none"}, nil)
	return func() error { return e.client.RemoveContainer(ctx, c.ID) }, err
}

func (e *varveEngine) uppers(context.Context) ([]string, error) {
	return filepath.Glob(filepath.Join(e.dir, "root", "active", "*", "fs"))
}

func (e *varveEngine) usage(ctx context.Context, verbose bool) error {
	args := []string{"df"}
	if verbose {
		args = append(args, "-v")
	}
	err := e.cli(ctx, nil, args...)
	if err != nil && strings.Contains(err.Error(), "unknown command") {
		return errUnknown
	}
	return err
}

// measure has varve look at what it looks at in the background.
func (e *varveEngine) measure(ctx context.Context) error { return e.cli(ctx, nil, "df", "--measure") }
