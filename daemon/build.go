package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/api/varve"
	"varve.dev/builder"
	"varve.dev/builder/contexttar"
	"varve.dev/errdefs"
	"varve.dev/image"
	"varve.dev/layout"
)

// Build implements varve.Builder.
func (e *Engine) Build(ctx context.Context, req varve.BuildRequest, files varve.BuildContext, progress func(varve.Event)) (varve.BuildResult, error) {
	dir := files.Dir
	if dir == "" {
		scratch, err := os.MkdirTemp(e.scratch.dir, "context-")
		if err != nil {
			return varve.BuildResult{}, fmt.Errorf("build context: %w: %w", err, errdefs.ErrUnavailable)
		}
		defer os.RemoveAll(scratch)
		if err := contexttar.Extract(ctx, files.Tar, scratch); err != nil {
			return varve.BuildResult{}, err
		}
		dir = scratch
	}
	names, err := fullNames(req.Tags)
	if err != nil {
		return varve.BuildResult{}, err
	}
	request := builder.Request{
		Images: baseImages{e: e, registry: req.Registry}, Context: dir,
		Dockerfile: req.Dockerfile, DockerfileBytes: req.DockerfileBytes, Target: req.Target,
		BuildArgs: req.BuildArgs, Labels: req.Labels, Platform: req.Platform, Network: req.Network,
		ExtraHosts: req.ExtraHosts, NoCache: req.NoCache, Pull: req.Pull, Names: names,
		Progress: forwardSteps(progress),
	}
	var result builder.Result
	err = e.healing(ctx, req.Registry, func() (err error) {
		result, err = e.builder.Build(ctx, request)
		return err
	})
	if err != nil {
		return varve.BuildResult{}, err
	}
	summary, err := e.summaryOfBuilt(ctx, result)
	return varve.BuildResult{Image: summary, Steps: result.Steps, Cached: result.Cached, Ran: result.Ran}, err
}

// summaryOfBuilt describes an image that was just made. It may have been removed
// since, or evicted: what it was is no error.
func (e *Engine) summaryOfBuilt(ctx context.Context, built builder.Result) (varve.ImageSummary, error) {
	summary, err := e.summary(ctx, built.Config.Digest.String())
	if errors.Is(err, errdefs.ErrNotFound) {
		return varve.ImageSummary{Name: "<none>", ID: built.Config.Digest.String(), Digest: built.Manifest.Digest.String()}, nil
	}
	return summary, err
}

func fullNames(tags []string) (names []string, err error) {
	for _, t := range tags {
		ref, err := image.ParseRef(t)
		if err != nil {
			return nil, err
		}
		names = append(names, ref.String())
	}
	return names, nil
}

// forwardSteps turns the builder's progress into events.
func forwardSteps(progress func(varve.Event)) func(builder.Event) {
	if progress == nil {
		return nil
	}
	return func(b builder.Event) {
		progress(varve.Event{ID: b.ID, Name: b.Name, Phase: varve.Phase(b.State), Log: b.Log, Text: b.Text})
	}
}

// baseImages are the images of the store, and of registries, as a build wants
// them.
type baseImages struct {
	e        *Engine
	registry varve.Registry
}

// Resolve implements builder.Images.
func (b baseImages) Resolve(ctx context.Context, name string, platform ocispec.Platform, fresh bool) (digest.Digest, []byte, error) {
	ref, err := image.ParseRef(name)
	if err != nil {
		return "", nil, err
	}
	match := platforms.Only(platform)
	images := b.e.imagesFor(b.registry, ref)
	if !fresh {
		r, err := images.ResolveLocal(ctx, ref.String(), match)
		if err == nil {
			return r.Target.Digest, r.JSON, nil
		}
		if !errors.Is(err, errdefs.ErrNotFound) {
			return "", nil, err
		}
	}
	r, err := images.Resolve(ctx, ref, match)
	return r.Target.Digest, r.JSON, err
}

// Snapshot implements builder.Images. The frontend writes the digest that was
// resolved behind the name; under the name alone the image may be here.
func (b baseImages) Snapshot(ctx context.Context, name string, resolved digest.Digest, platform ocispec.Platform) (layout.SnapshotKey, error) {
	ref, err := image.ParseRef(name)
	if err != nil {
		return "", err
	}
	candidates := []string{ref.String()}
	if ref.Digest() != "" {
		tag, _, _ := strings.Cut(name, "@")
		if tagged, err := image.ParseRef(tag); err == nil {
			candidates = append(candidates, tagged.String())
		}
	}
	for _, c := range candidates {
		d, err := b.e.unpacked(ctx, c)
		if err == nil && d.Target.Digest == resolved {
			return d.Snapshot, b.e.images.Touch(ctx, c)
		}
		if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			return "", err
		}
	}
	options := image.PullOptions{Platform: platforms.Only(platform)}
	for try := 1; ; try++ {
		pulled, err := b.e.imagesFor(b.registry, ref).Pull(ctx, ref, options)
		if err != nil {
			return "", err
		}
		d, err := b.e.images.Inspect(ctx, pulled.Name)
		if try == useTries || !errors.Is(err, errdefs.ErrNotFound) {
			return d.Snapshot, err
		}
	}
}
