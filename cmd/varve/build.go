package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/docker/cli/cli/config"
	"github.com/moby/buildkit/client"
	bkbuild "github.com/moby/buildkit/cmd/buildctl/build"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth/authprovider"
	"github.com/moby/buildkit/session/sshforward/sshprovider"
	bkerrdefs "github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/spf13/cobra"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/errdefs"
)

// buildFlags are buildx's.
type buildFlags struct {
	registryFlags
	file, target, network, iidfile, metadataFile, progress, call, cgroupParent, shmSize string

	platforms, tags, args, labels, hosts, outputs, secrets, ssh, contexts, ulimits []string
	cacheFrom, cacheTo, allow, annotations, attests, noCacheFilter                 []string
	sbom, provenance                                                               string
	noCache, pull, quiet, push, load, check                                        bool
}

func newBuild(g *globals) *cobra.Command {
	var f buildFlags
	cmd := &cobra.Command{
		Use:   "build [OPTIONS] DIRECTORY|URL",
		Short: "Build an image from a Dockerfile",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				return f.build(ctx, cmd, g, j, args[0])
			})
		},
	}
	f.registryFlags.add(cmd)
	fl := cmd.Flags()
	fl.StringVarP(&f.file, "file", "f", "", "the Dockerfile, - for standard input (default: DIRECTORY/Dockerfile)")
	fl.StringArrayVarP(&f.tags, "tag", "t", nil, "name of the image, NAME[:TAG]")
	fl.StringVar(&f.target, "target", "", "stage to build")
	fl.StringArrayVar(&f.args, "build-arg", nil, "NAME=VALUE of an ARG; NAME alone takes it from the environment")
	fl.StringArrayVar(&f.labels, "label", nil, "NAME=VALUE of a label")
	fl.StringArrayVar(&f.annotations, "annotation", nil, "[TYPE:]NAME=VALUE of an annotation")
	fl.StringArrayVar(&f.hosts, "add-host", nil, "NAME:ADDRESS for /etc/hosts of the steps")
	fl.StringSliceVar(&f.platforms, "platform", nil, "platforms to build for (default: this host's)")
	fl.StringVar(&f.network, "network", "", "network of RUN steps: host, none or default")
	fl.StringVar(&f.cgroupParent, "cgroup-parent", "", "parent cgroup of RUN steps")
	fl.StringVar(&f.shmSize, "shm-size", "", "bytes of /dev/shm in RUN steps")
	fl.StringArrayVar(&f.ulimits, "ulimit", nil, "NAME=SOFT[:HARD] of RUN steps")
	fl.BoolVar(&f.noCache, "no-cache", false, "run every step")
	fl.StringSliceVar(&f.noCacheFilter, "no-cache-filter", nil, "stages whose every step is run")
	fl.BoolVar(&f.pull, "pull", false, "ask the registry for newer base images")
	fl.StringArrayVarP(&f.outputs, "output", "o", nil, "where the result goes: type=image|oci|docker|tar|local[,dest=PATH,...], or a directory")
	fl.BoolVar(&f.push, "push", false, "push the image to its registry")
	fl.BoolVar(&f.load, "load", false, "keep the image in the store (it is, unless --output says otherwise)")
	fl.StringArrayVar(&f.secrets, "secret", nil, "id=NAME[,src=PATH|env=NAME] that RUN --mount=type=secret may see")
	fl.StringArrayVar(&f.ssh, "ssh", nil, "default|ID[=SOCKET|KEY,...] that RUN --mount=type=ssh may use")
	fl.StringArrayVar(&f.contexts, "build-context", nil, "NAME=DIRECTORY, or another source, for FROM and COPY --from")
	fl.StringArrayVar(&f.cacheFrom, "cache-from", nil, "type=registry|local,... to take cache from")
	fl.StringArrayVar(&f.cacheTo, "cache-to", nil, "type=registry|local|inline,... to leave cache in")
	fl.StringSliceVar(&f.allow, "allow", nil, "what a step may be granted: network.host, security.insecure")
	fl.StringArrayVar(&f.attests, "attest", nil, "type=sbom|provenance,... to attach")
	fl.StringVar(&f.sbom, "sbom", "", "short for --attest=type=sbom")
	fl.StringVar(&f.provenance, "provenance", "", "short for --attest=type=provenance")
	fl.StringVar(&f.call, "call", "build", "what to do: build, check, outline, targets")
	fl.BoolVar(&f.check, "check", false, "short for --call=check")
	fl.StringVar(&f.progress, "progress", "auto", "how progress is shown: auto, tty, plain, rawjson, quiet")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "print only the image's id")
	fl.StringVar(&f.iidfile, "iidfile", "", "write the image's id to a file")
	fl.StringVar(&f.metadataFile, "metadata-file", "", "write what came of the build to a file, as JSON")
	return cmd
}

// options are what the frontend is told, and where its files are.
func (f *buildFlags) options(g *globals, dir string) (opt client.SolveOpt, err error) {
	opt = client.SolveOpt{Frontend: "dockerfile.v0", LocalMounts: map[string]fsutil.FS{}, AllowedEntitlements: f.allow}
	attrs := map[string]string{}
	opt.FrontendAttrs = attrs
	set := func(key, value string) {
		if value != "" {
			attrs[key] = value
		}
	}
	set("target", f.target)
	set("platform", strings.Join(f.platforms, ","))
	if f.network != "default" {
		set("force-network-mode", f.network)
	}
	set("cgroup-parent", f.cgroupParent)
	set("shm-size", f.shmSize)
	set("ulimit", strings.Join(f.ulimits, ","))
	set("add-hosts", strings.Join(extraHosts(f.hosts), ","))
	set("no-cache", strings.Join(f.noCacheFilter, ","))
	if f.noCache {
		attrs["no-cache"] = ""
	}
	if f.pull {
		attrs["image-resolve-mode"] = "pull"
	}
	if err := f.named(attrs); err != nil {
		return opt, err
	}
	if err := f.files(&opt, dir); err != nil {
		return opt, err
	}
	registry, err := f.registry(g)
	if err != nil {
		return opt, err
	}
	data, err := json.Marshal(registry)
	if err != nil {
		return opt, err
	}
	attrs[varve.RegistryOption] = string(data)
	for what, value := range map[string]string{"sbom": f.sbom, "provenance": f.provenance} {
		if value != "" && value != "false" {
			attrs["attest:"+what] = attest(value)
		}
	}
	for _, a := range f.attests {
		kind, rest, _ := strings.Cut(a, ",")
		name, ok := strings.CutPrefix(kind, "type=")
		if !ok {
			return opt, errUsage("--attest %q does not begin with type=", a)
		}
		attrs["attest:"+name] = rest
	}
	return opt, f.rest(&opt)
}

// attest is the short form of an attestation's attributes.
func attest(value string) string {
	if value == "true" {
		return ""
	}
	return value
}

// named are the options that are a name and a value each.
func (f *buildFlags) named(attrs map[string]string) error {
	args, err := assignments("build-arg", f.args, os.LookupEnv)
	if err != nil {
		return err
	}
	for k, v := range args {
		attrs["build-arg:"+k] = v
	}
	none := func(string) (string, bool) { return "", true }
	labels, err := assignments("label", f.labels, none)
	if err != nil {
		return err
	}
	for k, v := range labels {
		attrs["label:"+k] = v
	}
	return nil
}

// rest is what the client does itself: caches, secrets, agents, outputs.
func (f *buildFlags) rest(opt *client.SolveOpt) (err error) {
	if opt.CacheImports, err = bkbuild.ParseImportCache(f.cacheFrom); err == nil {
		opt.CacheExports, err = bkbuild.ParseExportCache(f.cacheTo)
	}
	if err != nil {
		return errUsage("%v", err)
	}
	opt.Session = []session.Attachable{authprovider.NewDockerAuthProvider(authprovider.DockerAuthProviderConfig{
		AuthConfigProvider: authprovider.LoadAuthConfig(config.LoadDefaultConfigFile(io.Discard)),
	})}
	if len(f.secrets) > 0 {
		secrets, err := bkbuild.ParseSecret(f.secrets)
		if err != nil {
			return errUsage("%v", err)
		}
		opt.Session = append(opt.Session, secrets)
	}
	if len(f.ssh) > 0 {
		agents, err := bkbuild.ParseSSH(f.ssh)
		if err != nil {
			return errUsage("%v", err)
		}
		provider, err := sshprovider.NewSSHAgentProvider(agents)
		if err != nil {
			return errUsage("--ssh: %v", err)
		}
		opt.Session = append(opt.Session, provider)
	}
	return f.exports(opt)
}

// exports are where the result goes: into the store, if nothing is said.
func (f *buildFlags) exports(opt *client.SolveOpt) (err error) {
	var outputs []string
	for _, o := range f.outputs {
		if !strings.Contains(o, "=") {
			if o == "-" {
				o = "type=tar,dest=-"
			} else {
				o = "type=local,dest=" + o
			}
		}
		outputs = append(outputs, o)
	}
	if opt.Exports, err = bkbuild.ParseOutput(outputs); err != nil {
		return errUsage("%v", err)
	}
	if len(opt.Exports) == 0 {
		opt.Exports = []client.ExportEntry{{Type: client.ExporterImage, Attrs: map[string]string{}}}
	}
	for _, e := range opt.Exports {
		switch e.Type {
		case client.ExporterImage, client.ExporterOCI, client.ExporterDocker:
			if e.Attrs["name"] == "" && len(f.tags) > 0 {
				e.Attrs["name"] = strings.Join(f.tags, ",")
			}
			for _, a := range f.annotations {
				kind, rest, ok := strings.Cut(a, ":")
				if !ok || strings.Contains(kind, "=") {
					kind, rest = "manifest", a
				}
				name, value, ok := strings.Cut(rest, "=")
				if !ok {
					return errUsage("--annotation %q has no value", a)
				}
				e.Attrs["annotation-"+kind+"."+name] = value
			}
		}
		if e.Type == client.ExporterImage && f.push {
			e.Attrs["push"] = "true"
		}
	}
	return nil
}

// files finds the context, the Dockerfile and further contexts.
func (f *buildFlags) files(opt *client.SolveOpt, dir string) error {
	dockerfiles := dir
	name := "Dockerfile"
	switch {
	case f.file == "-":
		data, err := io.ReadAll(os.Stdin)
		if err != nil {
			return errUsage("dockerfile: %v", err)
		}
		if dockerfiles, err = os.MkdirTemp("", "varve-dockerfile-"); err == nil {
			cleanups = append(cleanups, dockerfiles)
			err = os.WriteFile(filepath.Join(dockerfiles, name), data, 0o600)
		}
		if err != nil {
			return fmt.Errorf("dockerfile: %w: %w", err, errdefs.ErrUnavailable)
		}
	case f.file != "" && !isURL(dir):
		if _, err := os.Stat(f.file); err != nil {
			return errUsage("dockerfile %s: %v", f.file, err)
		}
		dockerfiles, name = filepath.Dir(f.file), filepath.Base(f.file)
	case f.file != "":
		name = f.file
	}
	opt.FrontendAttrs["filename"] = name
	if isURL(dir) {
		opt.FrontendAttrs["context"] = dir
		if f.file == "-" {
			opt.FrontendAttrs["dockerfilekey"] = "dockerfile"
			return addLocal(opt, "dockerfile", dockerfiles)
		}
		return nil
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return errUsage("build context %q: %v", dir, err)
	}
	opt.SharedKey = abs // what was sent of it last is looked for by this
	if err := errors.Join(addLocal(opt, "context", dir), addLocal(opt, "dockerfile", dockerfiles)); err != nil {
		return err
	}
	for _, c := range f.contexts {
		name, value, ok := strings.Cut(c, "=")
		if !ok {
			return errUsage("--build-context %q is not NAME=SOURCE", c)
		}
		if fi, err := os.Stat(value); err == nil && fi.IsDir() {
			if err := addLocal(opt, name, value); err != nil {
				return err
			}
			value = "local:" + name
		}
		opt.FrontendAttrs["context:"+name] = value
	}
	return nil
}

// cleanups are directories that go when the command ends.
var cleanups []string

// isURL tells whether a context is not a directory of this host.
func isURL(s string) bool {
	return strings.Contains(s, "://") || strings.HasPrefix(s, "git@") || strings.HasPrefix(s, "github.com/")
}

// addLocal gives the builder a directory. Whose its files are here says nothing
// about the image.
func addLocal(opt *client.SolveOpt, name, dir string) error {
	if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
		return errUsage("build context %q is not a directory that can be read", dir)
	}
	files, err := fsutil.NewFS(dir)
	if err == nil {
		files, err = fsutil.NewFilterFS(files, &fsutil.FilterOpt{Map: func(_ string, st *fstypes.Stat) fsutil.MapResult {
			st.Uid, st.Gid = 0, 0
			return fsutil.MapResultKeep
		}})
	}
	if err != nil {
		return errUsage("build context %q: %v", dir, err)
	}
	opt.LocalMounts[name] = files
	return nil
}

// extraHosts turns NAME:ADDRESS into the frontend's NAME=ADDRESS.
func extraHosts(list []string) (out []string) {
	for _, h := range list {
		name, address, _ := strings.Cut(h, ":")
		out = append(out, name+"="+address)
	}
	return out
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

// calls are the frontend's requests by what --call calls them.
var calls = map[string]string{"check": "frontend.lint", "outline": "frontend.outline", "targets": "frontend.targets"}

func (f *buildFlags) build(ctx context.Context, cmd *cobra.Command, g *globals, j *daemon.Joined, dir string) error {
	opt, err := f.options(g, dir)
	defer func() {
		for _, dir := range cleanups {
			_ = os.RemoveAll(dir)
		}
	}()
	if err != nil {
		return err
	}
	w := &wire{dial: j.Dial}
	c, err := client.New(ctx, "", client.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.connect(ctx) }))
	if err != nil {
		return fmt.Errorf("builder: %w: %w", err, errdefs.ErrUnavailable)
	}
	defer c.Close()
	mode := progressui.DisplayMode(f.progress)
	if f.quiet {
		mode = progressui.QuietMode
	}
	display, err := progressui.NewDisplay(cmd.ErrOrStderr(), mode)
	if err != nil {
		return errUsage("--progress: %v", err)
	}
	events := make(chan *client.SolveStatus)
	shown := make(chan struct{})
	counted := &stepCount{seen: map[string]bool{}}
	go func() {
		defer close(shown)
		// To the end: a build that is called off tells of that too.
		_, _ = display.UpdateFrom(context.WithoutCancel(ctx), counted.through(events))
	}()
	if f.check {
		f.call = "check"
	}
	if f.call != "build" && f.call != "" {
		err = f.ask(ctx, cmd, c, opt, events)
		<-shown
		return tellBuild(cmd, w.explain(ctx, err))
	}
	res, err := c.Solve(ctx, nil, opt, events)
	<-shown
	if err != nil {
		return tellBuild(cmd, w.explain(ctx, err))
	}
	return f.report(cmd, res, counted)
}

// ask has the frontend answer instead of build.
func (f *buildFlags) ask(ctx context.Context, cmd *cobra.Command, c *client.Client, opt client.SolveOpt, events chan *client.SolveStatus) error {
	request, ok := calls[f.call]
	if !ok {
		close(events)
		return errUsage("--call %q is not build, check, outline or targets", f.call)
	}
	opt.Exports = nil
	opt.FrontendAttrs["requestid"] = request
	frontend := opt.Frontend
	opt.Frontend = ""
	_, err := c.Build(ctx, opt, "varve", func(ctx context.Context, g gwclient.Client) (*gwclient.Result, error) {
		res, err := g.Solve(ctx, gwclient.SolveRequest{Frontend: frontend, FrontendOpt: opt.FrontendAttrs})
		if err == nil {
			_, err = cmd.OutOrStdout().Write(res.Metadata["result.txt"])
		}
		return res, err
	}, events)
	return err
}

// wire is the way to the builder.
type wire struct {
	dial func(context.Context) (net.Conn, error)
	cut  atomic.Bool // by the other side
}

func (w *wire) connect(ctx context.Context) (net.Conn, error) {
	conn, err := w.dial(ctx)
	if err != nil {
		w.cut.Store(true) // it was there a moment ago
		return nil, err
	}
	return &wireConn{conn, w}, nil
}

type wireConn struct {
	net.Conn
	w *wire
}

func (c *wireConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil && !errors.Is(err, net.ErrClosed) {
		c.w.cut.Store(true)
	}
	return n, err
}

// explain gives an error of gRPC's the kind that it has for this process.
func (w *wire) explain(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w", ctx.Err(), err)
	case w.cut.Load():
		return fmt.Errorf("%w: %w", varve.ErrCutOff, err)
	}
	return err
}

// tellBuild shows where in the Dockerfile a build failed.
func tellBuild(cmd *cobra.Command, err error) error {
	for _, s := range bkerrdefs.Sources(err) {
		_ = s.Print(cmd.ErrOrStderr())
	}
	return err
}

// report says what came of a build.
func (f *buildFlags) report(cmd *cobra.Command, res *client.SolveResponse, n *stepCount) error {
	id := res.ExporterResponse["containerimage.config.digest"]
	if id == "" {
		id = res.ExporterResponse["containerimage.digest"]
	}
	if f.iidfile != "" {
		if err := os.WriteFile(f.iidfile, []byte(id), 0o644); err != nil {
			return errUsage("iidfile: %v", err)
		}
	}
	if f.metadataFile != "" {
		data, err := json.MarshalIndent(metadataOf(res), "", "  ")
		if err == nil {
			err = os.WriteFile(f.metadataFile, data, 0o644)
		}
		if err != nil {
			return errUsage("metadata-file: %v", err)
		}
	}
	if len(f.outputs) > 0 && id == "" {
		return nil
	}
	fmt.Fprintln(cmd.OutOrStdout(), id)
	if f.quiet {
		return nil
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%d steps: %d cached, %d run\n", n.cached+n.ran, n.cached, n.ran)
	for _, t := range f.tags {
		fmt.Fprintf(cmd.OutOrStdout(), "Tagged: %s\n", t)
	}
	return nil
}

// metadataOf is what came of a build, with what is JSON in it as such.
func metadataOf(res *client.SolveResponse) map[string]any {
	out := map[string]any{}
	for k, v := range res.ExporterResponse {
		if raw := json.RawMessage(v); json.Valid(raw) && strings.HasPrefix(v, "{") {
			out[k] = raw
		} else {
			out[k] = v
		}
	}
	return out
}

// stepCount counts the instructions of a build, as their progress passes.
type stepCount struct {
	seen        map[string]bool
	cached, ran int
}

func (n *stepCount) through(in chan *client.SolveStatus) chan *client.SolveStatus {
	out := make(chan *client.SolveStatus)
	go func() {
		defer close(out)
		for s := range in {
			for _, v := range s.Vertexes {
				n.count(v)
			}
			out <- s
		}
	}()
	return out
}

// count takes one vertex that is over. What is no instruction, and the base
// images, are no steps.
func (n *stepCount) count(v *client.Vertex) {
	stage, instruction, ok := strings.Cut(v.Name, "] ")
	id := v.Digest.String()
	if v.Completed == nil || n.seen[id] || !ok || !strings.HasPrefix(stage, "[") || stage == "[internal" || strings.HasPrefix(instruction, "FROM ") {
		return
	}
	n.seen[id] = true
	if v.Cached {
		n.cached++
	} else {
		n.ran++
	}
}
