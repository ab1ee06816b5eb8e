package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"varve.dev/benchmarks/bench"
)

// engine builds.
type engine interface {
	name() string
	// build makes an image of a context with its Dockerfile, in the engine's own
	// store. fresh is a build argument that no build had before.
	build(ctx context.Context, dir, fresh string) error
	// export builds, and writes the image to a file.
	export(ctx context.Context, dir, fresh, file string) error
}

// startEngines starts varve, and the peers that are there.
func startEngines(ctx context.Context, b *bench.Bench, command, registry string, peers bool) ([]engine, error) {
	bin, err := bench.Peer(ctx, "buildkit")
	if err != nil {
		return nil, err
	}
	dir, err := b.Mkdir("bin")
	if err != nil {
		return nil, err
	}
	// By that name it takes buildkitd's flags.
	alias := filepath.Join(dir, "buildkitd")
	if err := os.Symlink(command, alias); err != nil {
		return nil, err
	}
	varve, err := startBuildkitd(ctx, b, "varve", alias, bin+"/buildctl", registry)
	if err != nil || !peers {
		return []engine{varve}, err
	}
	theirs, err := startBuildkitd(ctx, b, "buildkitd", bin+"/buildkitd", bin+"/buildctl", registry)
	if err != nil {
		return nil, err
	}
	engines := []engine{varve, theirs}
	if _, err := exec.LookPath(debianDocker); err != nil {
		fmt.Println("dockerd is left out: docker.io is not installed")
		return engines, nil
	}
	docker, err := startDocker(ctx, b)
	return append(engines, docker), err
}

// buildkitd is a daemon that buildctl drives.
type buildkitd struct{ called, buildctl, address string }

func startBuildkitd(ctx context.Context, b *bench.Bench, name, daemon, buildctl, registry string) (engine, error) {
	dir, err := b.Mkdir(name)
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "buildkitd.toml")
	text := fmt.Sprintf("[registry.%q]\n  http = true\n[worker.containerd]\n  enabled = false\n"+
		"[worker.oci]\n  snapshotter = \"overlayfs\"\n  binary = \"runc\"\n  networkMode = \"host\"\n", registry)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	e := &buildkitd{name, buildctl, "unix://" + filepath.Join(dir, "sock")}
	cmd := exec.Command(daemon, "--config", config, "--root", filepath.Join(dir, "root"), "--addr", e.address)
	return e, b.Start(ctx, cmd, func() error { return e.run(ctx, "debug", "workers") })
}

func (e *buildkitd) name() string { return e.called }

func (e *buildkitd) run(ctx context.Context, args ...string) error {
	_, err := bench.Output(ctx, nil, append([]string{e.buildctl, "--addr", e.address}, args...)...)
	return err
}

func (e *buildkitd) with(ctx context.Context, dir, fresh, output string) error {
	return e.run(ctx, "build", "--progress=plain", "--frontend=dockerfile.v0", "--local=context="+dir, "--local=dockerfile="+dir,
		"--opt=build-arg:FRESH="+fresh, "--output="+output)
}

func (e *buildkitd) build(ctx context.Context, dir, fresh string) error {
	return e.with(ctx, dir, fresh, "type=image,name=bench")
}

func (e *buildkitd) export(ctx context.Context, dir, fresh, file string) error {
	return e.with(ctx, dir, fresh, "type=oci,dest="+file)
}

// docker is Debian's daemon with the BuildKit in it.
type docker struct{ host string }

// debianDocker is the command that has BuildKit's client in it, as newer ones do
// not.
const debianDocker = "/usr/bin/docker"

func startDocker(ctx context.Context, b *bench.Bench) (engine, error) {
	dir, err := b.Mkdir("dockerd")
	if err != nil {
		return nil, err
	}
	cmd, host := bench.Dockerd(dir)
	e := &docker{host}
	return e, b.Start(ctx, cmd, func() error { return e.run(ctx, "version") })
}

func (e *docker) name() string { return "dockerd" }

func (e *docker) run(ctx context.Context, args ...string) error {
	_, err := bench.Output(ctx, []string{"DOCKER_BUILDKIT=1"}, append([]string{debianDocker, "-H", e.host}, args...)...)
	return err
}

func (e *docker) build(ctx context.Context, dir, fresh string) error {
	return e.run(ctx, "build", "--network=host", "--progress=plain", "-t", "bench", "--build-arg", "FRESH="+fresh, dir)
}

func (e *docker) export(ctx context.Context, dir, fresh, file string) error {
	if err := e.build(ctx, dir, fresh); err != nil {
		return err
	}
	return e.run(ctx, "save", "-o", file, "bench")
}
