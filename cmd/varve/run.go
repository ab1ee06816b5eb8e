package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/runtime"
)

// exitRuntime is docker's exit code for a container that could not be made or
// started.
const exitRuntime = 125

type runFlags struct {
	registryFlags
	rm, terminal, stdin      bool
	entrypoint, memory, cpus string
	envFiles                 []string
	req                      varve.CreateRequest
}

func newRun(g *globals) *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run [OPTIONS] IMAGE [COMMAND] [ARG...]",
		Short: "Run a command in a new container and wait for it",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			err := f.run(cmd, g, args)
			var exit exitError
			if err == nil || errors.As(err, &exit) {
				return err
			}
			fmt.Fprintln(cmd.ErrOrStderr(), "varve:", err)
			return exitError(exitRuntime)
		},
	}
	f.registryFlags.add(cmd)
	fl := cmd.Flags()
	fl.SetInterspersed(false) // what follows IMAGE is the container's
	fl.BoolVar(&f.rm, "rm", false, "remove the container when it has ended")
	fl.BoolVarP(&f.terminal, "tty", "t", false, "give the container a terminal")
	fl.BoolVarP(&f.stdin, "interactive", "i", false, "keep standard input open")
	fl.StringArrayVarP(&f.req.Env, "env", "e", nil, "NAME=VALUE; NAME alone takes it from the environment")
	fl.StringArrayVar(&f.envFiles, "env-file", nil, "file of NAME=VALUE lines")
	fl.StringArrayVarP(&f.req.Volumes, "volume", "v", nil, "HOST:CONTAINER[:ro]")
	fl.StringVarP(&f.req.WorkingDir, "workdir", "w", "", "working directory in the container")
	fl.StringVarP(&f.req.User, "user", "u", "", "NAME|UID[:GROUP|GID]")
	fl.StringVar(&f.req.Name, "name", "", "name of the container")
	fl.StringVarP(&f.req.Hostname, "hostname", "h", "", "host name in the container")
	fl.StringVar(&f.req.Network, "network", "host", "host or none")
	fl.StringVar(&f.entrypoint, "entrypoint", "", "program in place of the image's entry point")
	fl.BoolVar(&f.req.ReadOnly, "read-only", false, "mount the root file system read-only")
	fl.BoolVar(&f.req.Privileged, "privileged", false, "all capabilities and devices, no seccomp, nothing masked")
	fl.StringArrayVar(&f.req.CapAdd, "cap-add", nil, "capability to add")
	fl.StringArrayVar(&f.req.CapDrop, "cap-drop", nil, "capability to drop")
	fl.StringVarP(&f.memory, "memory", "m", "", "limit of memory in bytes, or with k, m, g")
	fl.StringVar(&f.cpus, "cpus", "", "number of processors, such as 1.5")
	fl.Int64Var(&f.req.PidsLimit, "pids-limit", 0, "limit of processes (0: none)")
	fl.StringVar(&f.req.Pull, "pull", "missing", "pull the image: missing, always or never")
	fl.StringVar(&f.req.Platform, "platform", "", "platform of the image")
	fl.Bool("help", false, "help for run") // -h is the host name, as in docker
	return cmd
}

// complete fills in what the flags say in other words.
func (f *runFlags) complete(g *globals, fl interface{ Changed(string) bool }, args []string) error {
	var err error
	if f.req.Registry, err = f.registry(g); err != nil {
		return err
	}
	f.req.Image, f.req.Command = args[0], args[1:]
	f.req.Terminal, f.req.Stdin = f.terminal, f.stdin
	if fl.Changed("entrypoint") {
		f.req.Entrypoint = []string{}
		if f.entrypoint != "" {
			f.req.Entrypoint = []string{f.entrypoint}
		}
	}
	if f.req.Env, err = environment(f.envFiles, f.req.Env); err != nil {
		return err
	}
	if f.memory != "" {
		if f.req.Memory, err = units.RAMInBytes(f.memory); err != nil || f.req.Memory <= 0 {
			return errUsage("--memory %q is not a number of bytes", f.memory)
		}
	}
	if f.cpus != "" {
		n, err := strconv.ParseFloat(f.cpus, 64)
		if err != nil || n <= 0 || math.IsInf(n, 0) || math.IsNaN(n) {
			return errUsage("--cpus %q is not a positive number", f.cpus)
		}
		f.req.NanoCPUs = int64(n * 1e9)
	}
	for i, v := range f.req.Volumes {
		host, rest, _ := strings.Cut(v, ":")
		if strings.HasPrefix(host, "./") || host == "." || strings.HasPrefix(host, "../") {
			abs, err := filepath.Abs(host)
			if err != nil {
				return errUsage("--volume %q: %v", v, err)
			}
			f.req.Volumes[i] = abs + ":" + rest
		}
	}
	if f.terminal && !term.IsTerminal(int(os.Stdin.Fd())) {
		return errUsage("--tty: standard input is not a terminal")
	}
	return nil
}

// environment reads the files, then the flags, which come last and so win.
func environment(files, flags []string) ([]string, error) {
	var all []string
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, errUsage("--env-file: %v", err)
		}
		for line := range strings.Lines(string(data)) {
			line = strings.TrimSpace(line)
			if line != "" && !strings.HasPrefix(line, "#") {
				all = append(all, line)
			}
		}
	}
	out := []string{}
	for _, e := range append(all, flags...) {
		if strings.HasPrefix(e, "=") {
			return nil, errUsage("environment %q has no name", e)
		}
		if !strings.Contains(e, "=") {
			value, found := os.LookupEnv(e)
			if !found {
				continue
			}
			e += "=" + value
		}
		out = append(out, e)
	}
	return out, nil
}

// run makes the container, lets go of the store while the container runs, and
// joins it again only to remove the container.
func (f *runFlags) run(cmd *cobra.Command, g *globals, args []string) error {
	if err := f.complete(g, cmd.Flags(), args); err != nil {
		return err
	}
	var c varve.Container
	err := g.with(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
		show := newProgress(cmd.ErrOrStderr(), false)
		var err error
		c, err = j.Create(ctx, f.req, show.event)
		show.finish()
		return err
	})
	if err != nil {
		return err
	}
	code, runErr := f.shim(c)
	if f.rm {
		err := g.with(context.WithoutCancel(cmd.Context()), func(ctx context.Context, j *daemon.Joined) error {
			return j.RemoveContainer(ctx, c.ID)
		})
		if runErr == nil {
			runErr = err
		}
	}
	if runErr == nil && code != 0 {
		return exitError(code)
	}
	return runErr
}

// shim runs the container's shim with this command's own standard streams, so
// that a terminal is the container's without a copy in between.
func (f *runFlags) shim(c varve.Container) (int, error) {
	path, err := runtime.FindShim()
	if err != nil {
		return 0, err
	}
	return runtime.Foreground(path, c.Dir)
}
