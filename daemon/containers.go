package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/api/varve"
	"varve.dev/builder"
	"varve.dev/errdefs"
	"varve.dev/image"
	"varve.dev/layout"
	"varve.dev/runtime"
	"varve.dev/runtime/containers"
)

// Create implements varve.Containers.
func (e *Engine) Create(ctx context.Context, req varve.CreateRequest, progress func(varve.Event)) (varve.Container, error) {
	var out varve.Container
	err := e.healing(ctx, req.Registry, func() error {
		for try := 1; ; try++ {
			details, err := e.imageToRun(ctx, req, progress)
			if err != nil {
				return err
			}
			spec, err := specOf(req, details.Image.Config)
			if err != nil {
				return err
			}
			from := containers.Image{Name: req.Image, Config: details.JSON, Top: details.Snapshot}
			id, dir, err := e.containers.Create(ctx, from, spec)
			if err == nil {
				out = varve.Container{ID: string(id), Dir: dir}
				return e.touch(ctx, req.Image)
			}
			if try == useTries || !errors.Is(err, errdefs.ErrNotFound) {
				return err
			}
		}
	})
	return out, err
}

// useTries is how often an image is brought that is removed, or evicted, between
// its pull and its use.
const useTries = 3

// touch notes that an image is used; for one that was named by its id nothing
// does.
func (e *Engine) touch(ctx context.Context, name string) error {
	ref, err := image.ParseRef(name)
	if err != nil {
		return nil
	}
	return e.images.Touch(ctx, ref.String())
}

// Commit implements varve.Containers.
func (e *Engine) Commit(ctx context.Context, req varve.CommitRequest) (varve.ImageSummary, error) {
	var names []string
	if req.Name != "" {
		var err error
		if names, err = fullNames([]string{req.Name}); err != nil {
			return varve.ImageSummary{}, err
		}
	}
	held, err := e.containers.Hold(ctx, req.Container)
	if err != nil {
		return varve.ImageSummary{}, fmt.Errorf("commit: %w", err)
	}
	defer held.Close()
	spec, err := runtime.Load(e.root.Path(layout.ContainerPath(held.ID)))
	if err != nil {
		return varve.ImageSummary{}, fmt.Errorf("commit: %w", err)
	}
	result, err := e.builder.Commit(ctx, builder.CommitRequest{
		Snapshot: held.Snapshot, Config: held.Config, Names: names,
		Author: req.Author, Message: req.Message, Command: spec.Args,
	})
	if err != nil {
		return varve.ImageSummary{}, fmt.Errorf("commit container %s: %w", req.Container, err)
	}
	return e.summaryOfBuilt(ctx, result)
}

// RemoveContainer implements varve.Containers.
func (e *Engine) RemoveContainer(ctx context.Context, id string) error {
	return e.containers.Remove(ctx, layout.ContainerID(id))
}

// imageToRun finds the image, pulling it as the request says.
func (e *Engine) imageToRun(ctx context.Context, req varve.CreateRequest, progress func(varve.Event)) (image.Details, error) {
	pull := varve.PullRequest{Reference: req.Image, Platform: req.Platform, Registry: req.Registry}
	switch req.Pull {
	case "", "missing", "never":
		d, err := e.unpacked(ctx, req.Image)
		if !errors.Is(err, errdefs.ErrNotFound) || req.Pull == "never" {
			return d, err
		}
	case "always":
	default:
		return image.Details{}, fmt.Errorf("pull policy %q is not missing, always or never: %w", req.Pull, errdefs.ErrInvalidArgument)
	}
	for try := 1; ; try++ {
		if _, err := e.Pull(ctx, pull, progress); err != nil {
			return image.Details{}, err
		}
		d, err := e.images.Inspect(ctx, req.Image)
		if try == useTries || !errors.Is(err, errdefs.ErrNotFound) {
			return d, err
		}
	}
}

// unpacked looks at an image that is to be used, and unpacks it if it was not.
func (e *Engine) unpacked(ctx context.Context, what string) (image.Details, error) {
	return e.unpackedFor(ctx, what, nil)
}

// unpackedFor is unpacked for a platform; nil stands for this machine's.
func (e *Engine) unpackedFor(ctx context.Context, what string, platform platforms.MatchComparer) (image.Details, error) {
	d, err := e.images.InspectFor(ctx, what, platform)
	if err != nil || d.Snapshot != "" || len(d.Image.RootFS.DiffIDs) == 0 {
		return d, err
	}
	if err := e.images.Unpack(ctx, what, platform); err != nil {
		return d, err
	}
	return e.images.InspectFor(ctx, what, platform)
}

// specOf merges what the caller wants with what the image says, by docker's
// rules: a command or an entry point given replaces the image's, and a given
// entry point drops the image's command too.
func specOf(req varve.CreateRequest, config ocispec.ImageConfig) (runtime.Spec, error) {
	entry, cmd := config.Entrypoint, config.Cmd
	if req.Entrypoint != nil {
		entry, cmd = req.Entrypoint, nil
	}
	if len(req.Command) > 0 {
		cmd = req.Command
	}
	args := append(append([]string{}, entry...), cmd...)
	if len(args) == 0 {
		return runtime.Spec{}, fmt.Errorf("image %s has no command, and none is given: %w", req.Image, errdefs.ErrInvalidArgument)
	}
	mounts, err := volumes(req.Volumes)
	if err != nil {
		return runtime.Spec{}, err
	}
	network := runtime.Network(req.Network)
	if network == "" {
		network = runtime.HostNetwork
	}
	if network == runtime.HostNetwork {
		mounts = append(hostNames(), mounts...)
	}
	spec := runtime.Spec{
		Name: req.Name, Args: args, Env: mergeEnv(config.Env, req.Env), Cwd: req.WorkingDir, User: req.User,
		Hostname: req.Hostname, ReadOnly: req.ReadOnly, Mounts: mounts, Network: network,
		Terminal: req.Terminal, Stdin: req.Stdin, Privileged: req.Privileged, CapAdd: req.CapAdd, CapDrop: req.CapDrop,
		Memory: req.Memory, NanoCPUs: req.NanoCPUs, PidsLimit: req.PidsLimit,
	}
	if spec.Cwd == "" {
		spec.Cwd = config.WorkingDir
	}
	if spec.User == "" {
		spec.User = config.User
	}
	return spec, nil
}

// hostNames gives a container in the host's network the host's way to resolve
// names.
func hostNames() (mounts []runtime.Mount) {
	for _, name := range []string{"/etc/resolv.conf", "/etc/hosts"} {
		if real, err := filepath.EvalSymlinks(name); err == nil {
			mounts = append(mounts, runtime.Mount{Type: "bind", Source: real, Target: name, ReadOnly: true})
		}
	}
	return mounts
}

// mergeEnv puts the caller's variables in place of the image's.
func mergeEnv(base, extra []string) []string {
	out := append([]string{}, base...)
next:
	for _, e := range extra {
		name, _, _ := strings.Cut(e, "=")
		for i, have := range out {
			if strings.HasPrefix(have, name+"=") {
				out[i] = e
				continue next
			}
		}
		out = append(out, e)
	}
	return out
}

// volumes reads HOST:CONTAINER[:OPTIONS]. A host directory that is not there
// is made, as docker does.
func volumes(list []string) (mounts []runtime.Mount, err error) {
	for _, v := range list {
		parts := strings.Split(v, ":")
		if len(parts) < 2 || len(parts) > 3 || !filepath.IsAbs(parts[0]) || !filepath.IsAbs(parts[1]) {
			return nil, fmt.Errorf("volume %q is not of the form /HOST:/CONTAINER[:ro]: %w", v, errdefs.ErrInvalidArgument)
		}
		m := runtime.Mount{Type: "bind", Source: parts[0], Target: parts[1]}
		if len(parts) == 3 {
			for option := range strings.SplitSeq(parts[2], ",") {
				switch option {
				case "ro":
					m.ReadOnly = true
				case "rw", "z", "Z": // relabelling is for SELinux hosts only
				case "private", "rprivate", "shared", "rshared", "slave", "rslave":
					m.Options = append(m.Options, option)
				default:
					return nil, fmt.Errorf("volume %q has the unknown option %q: %w", v, option, errdefs.ErrInvalidArgument)
				}
			}
		}
		if err := os.MkdirAll(m.Source, 0o755); err != nil && !isFile(m.Source) {
			return nil, fmt.Errorf("volume %q: %w: %w", v, err, errdefs.ErrInvalidArgument)
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

func isFile(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && !fi.IsDir()
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
