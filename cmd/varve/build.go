package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"varve.dev/api/varve"
	"varve.dev/builder/contexttar"
	"varve.dev/daemon"
)

type buildFlags struct {
	registryFlags
	file, target, platform, network, iidfile string
	tags, args, labels, hosts                []string
	noCache, pull, quiet                     bool
}

func newBuild(g *globals) *cobra.Command {
	var f buildFlags
	cmd := &cobra.Command{
		Use:   "build [OPTIONS] DIRECTORY",
		Short: "Build an image from a Dockerfile",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := f.request(g, args[0])
			if err != nil {
				return err
			}
			return g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				return f.build(ctx, cmd, j, req, args[0])
			})
		},
	}
	f.registryFlags.add(cmd)
	fl := cmd.Flags()
	fl.StringVarP(&f.file, "file", "f", "", "the Dockerfile, - for standard input (default: DIRECTORY/Dockerfile)")
	fl.StringArrayVarP(&f.tags, "tag", "t", nil, "name of the image, NAME[:TAG]; may be repeated")
	fl.StringVar(&f.target, "target", "", "stage to build")
	fl.StringArrayVar(&f.args, "build-arg", nil, "NAME=VALUE of an ARG; NAME alone takes it from the environment")
	fl.StringArrayVar(&f.labels, "label", nil, "NAME=VALUE of a label")
	fl.StringArrayVar(&f.hosts, "add-host", nil, "NAME:ADDRESS for /etc/hosts of the steps")
	fl.StringVar(&f.platform, "platform", "", "platform to build for (default: this host's)")
	fl.StringVar(&f.network, "network", "", "network of RUN steps: host, none or default")
	fl.BoolVar(&f.noCache, "no-cache", false, "run every step")
	fl.BoolVar(&f.pull, "pull", false, "ask the registry for newer base images")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "print only the image's id")
	fl.StringVar(&f.iidfile, "iidfile", "", "write the image's id to a file")
	return cmd
}

func (f *buildFlags) request(g *globals, dir string) (varve.BuildRequest, error) {
	registry, err := f.registry(g)
	if err != nil {
		return varve.BuildRequest{}, err
	}
	if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
		return varve.BuildRequest{}, errUsage("build context %q is not a directory that can be read", dir)
	}
	req := varve.BuildRequest{
		Tags: f.tags, Target: f.target, Platform: f.platform, Network: f.network,
		ExtraHosts: f.hosts, NoCache: f.noCache, Pull: f.pull, Registry: registry,
	}
	if req.BuildArgs, err = assignments("build-arg", f.args, os.LookupEnv); err != nil {
		return req, err
	}
	none := func(string) (string, bool) { return "", true }
	if req.Labels, err = assignments("label", f.labels, none); err != nil {
		return req, err
	}
	return req, f.dockerfile(&req, dir)
}

// dockerfile finds the Dockerfile: in the context by its path there, from
// elsewhere by its bytes.
func (f *buildFlags) dockerfile(req *varve.BuildRequest, dir string) error {
	if f.file == "" {
		return nil
	}
	var err error
	if f.file == "-" {
		req.DockerfileBytes, err = io.ReadAll(os.Stdin)
	} else if rel, ok := inside(dir, f.file); ok {
		req.Dockerfile = rel
		_, err = os.Stat(f.file)
	} else {
		req.DockerfileBytes, err = os.ReadFile(f.file)
	}
	if err != nil {
		return errUsage("dockerfile %s: %v", f.file, err)
	}
	return nil
}

// inside returns file's path in dir, if it is there.
func inside(dir, file string) (string, bool) {
	d, err1 := filepath.Abs(dir)
	p, err2 := filepath.Abs(file)
	if err1 != nil || err2 != nil {
		return "", false
	}
	rel, err := filepath.Rel(d, p)
	return rel, err == nil && filepath.IsLocal(rel)
}

// assignments splits NAME=VALUE; lookup gives the value of a NAME alone, or
// says that there is none and the name is left out, as docker does.
func assignments(flag string, list []string, lookup func(string) (string, bool)) (map[string]string, error) {
	out := map[string]string{}
	for _, a := range list {
		name, value, found := strings.Cut(a, "=")
		if name == "" {
			return nil, errUsage("--%s %q has no name", flag, a)
		}
		if !found {
			if value, found = lookup(name); !found {
				continue
			}
		}
		out[name] = value
	}
	return out, nil
}

func (f *buildFlags) build(ctx context.Context, cmd *cobra.Command, j *daemon.Joined, req varve.BuildRequest, dir string) error {
	files := varve.BuildContext{Dir: dir}
	if !j.Embedded {
		tar, err := contexttar.Open(ctx, dir, req.Dockerfile)
		if err != nil {
			return err
		}
		defer tar.Close()
		files = varve.BuildContext{Tar: tar}
	}
	show := newProgress(cmd.ErrOrStderr(), f.quiet)
	r, err := j.Build(ctx, req, files, show.event)
	show.finish()
	if err != nil {
		return err
	}
	if f.iidfile != "" {
		if err := os.WriteFile(f.iidfile, []byte(r.Image.ID), 0o644); err != nil {
			return errUsage("iidfile: %v", err)
		}
	}
	if f.quiet {
		fmt.Fprintln(cmd.OutOrStdout(), r.Image.ID)
		return nil
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s\n%d steps: %d cached, %d run\n", r.Image.ID, r.Steps, r.Cached, r.Ran)
	for _, t := range req.Tags {
		fmt.Fprintf(cmd.OutOrStdout(), "Tagged: %s\n", t)
	}
	return nil
}
