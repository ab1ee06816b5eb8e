package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
	"github.com/spf13/cobra"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/errdefs"
)

// buildkitdName is how varve is called to be what BuildKit's clients, and what
// starts a daemon for them, expect of buildkitd.
const buildkitdName = "buildkitd"

// buildkitdConfig is what of buildkitd.toml means something here. The rest is
// about workers that varve has not.
type buildkitdConfig struct {
	Root         string   `toml:"root"`
	Entitlements []string `toml:"insecure-entitlements"`
	// ProvenanceEnvDir has facts to tell in the provenance of builds.
	ProvenanceEnvDir string `toml:"provenanceEnvDir"`
	GRPC             struct {
		Address []string `toml:"address"`
		// DebugAddress is where profiles of the daemon are; empty: nowhere.
		DebugAddress string `toml:"debugAddress"`
	} `toml:"grpc"`
	CDI struct {
		Disabled *bool    `toml:"disabled"`
		SpecDirs []string `toml:"specDirs"`
	} `toml:"cdi"`
	Worker struct {
		OCI struct {
			Labels map[string]string `toml:"labels"`
			buildkitdGC
		} `toml:"oci"`
	} `toml:"worker"`
	Registry map[string]buildkitdRegistry `toml:"registry"`
}

type buildkitdRegistry struct {
	Mirrors  []string `toml:"mirrors"`
	HTTP     *bool    `toml:"http"`
	Insecure *bool    `toml:"insecure"`
	CA       []string `toml:"ca"`
	KeyPairs []struct {
		Key  string `toml:"key"`
		Cert string `toml:"cert"`
	} `toml:"keypair"`
}

// The places that buildkitd uses when nothing else is said.
const (
	buildkitdRoot       = "/var/lib/buildkit"
	buildkitdConf       = "/etc/buildkit/buildkitd.toml"
	buildkitdProvenance = "/etc/buildkit/provenance.d"
	buildkitdSocket     = "unix:///run/buildkit/buildkitd.sock"
)

// newBuildkitd is the daemon under buildkitd's name and with its flags.
func newBuildkitd() *cobra.Command {
	var file, root, debug string
	var addrs, allow, labels []string
	var gcOn bool
	cmd := &cobra.Command{
		Use: buildkitdName, Short: "varve in buildkitd's place", Args: cobra.NoArgs, SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := readBuildkitd(file)
			if err != nil {
				return err
			}
			c.Root = first(root, c.Root, buildkitdRoot)
			if len(addrs) > 0 {
				c.GRPC.Address = addrs
			}
			if len(c.GRPC.Address) == 0 {
				c.GRPC.Address = []string{buildkitdSocket}
			}
			c.GRPC.DebugAddress = first(debug, c.GRPC.DebugAddress)
			c.Entitlements = append(c.Entitlements, allow...)
			if c.Worker.OCI.Labels == nil {
				c.Worker.OCI.Labels = map[string]string{}
			}
			for _, l := range labels {
				name, value, _ := strings.Cut(l, "=")
				c.Worker.OCI.Labels[name] = value
			}
			if cmd.Flags().Changed("oci-worker-gc") {
				c.Worker.OCI.GC = &gcOn
			}
			return serveBuildkitd(cmd, c)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&file, "config", "", "path to config file (default "+buildkitdConf+" if it is there)")
	fl.StringVar(&root, "root", "", "path to state directory (default "+buildkitdRoot+")")
	fl.StringArrayVar(&addrs, "addr", nil, "listening address (default "+buildkitdSocket+")")
	fl.StringVar(&debug, "debugaddr", "", "debugging address of this host (eg. 127.0.0.1:6060)")
	fl.StringArrayVar(&allow, "allow-insecure-entitlement", nil, "allows insecure entitlements e.g. network.host, security.insecure, device")
	fl.StringArrayVar(&labels, "oci-worker-labels", nil, "user-specific annotation labels (com.example.foo=bar)")
	fl.BoolVar(&gcOn, "oci-worker-gc", true, "keep the build cache within the limits of the config file")
	for _, name := range []string{"debug", "trace", "oci-worker", "containerd-worker", "rootless", "save-cache-debug", "cdi-disabled", "oci-worker-selinux",
		"oci-worker-no-process-sandbox", "containerd-worker-gc"} {
		fl.Bool(name, false, "accepted, means nothing here")
	}
	for _, name := range []string{"log-format", "log-level", "group", "oci-worker-snapshotter", "oci-worker-net", "oci-worker-binary",
		"oci-worker-platform", "oci-max-parallelism", "otel-socket-path", "cdi-spec-dir", "oci-worker-gc-keepstorage"} {
		fl.String(name, "", "accepted, means nothing here")
	}
	return cmd
}

func readBuildkitd(path string) (c buildkitdConfig, err error) {
	optional := path == ""
	if optional {
		path = buildkitdConf
	}
	_, err = toml.DecodeFile(path, &c)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		err = fmt.Errorf("configuration %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	return c, err
}

// builtinFacts are what the builder itself tells in provenance.
var builtinFacts = []string{"buildConfig", "builderPlatform", "platform"}

// readProvenanceEnv reads the JSON objects in a directory, which need not be
// there, into one; of two that tell the same the later by name holds.
func readProvenanceEnv(dir string) (map[string]any, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("provenance %s: %w: %w", dir, err, errdefs.ErrUnavailable)
	}
	env := map[string]any{}
	for _, e := range entries {
		if e.IsDir() || filepath.Ext(e.Name()) != ".json" {
			continue
		}
		name := filepath.Join(dir, e.Name())
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("provenance %s: %w: %w", name, err, errdefs.ErrUnavailable)
		}
		if err := json.Unmarshal(data, &env); err != nil {
			return nil, fmt.Errorf("provenance %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
	}
	for _, key := range builtinFacts {
		if _, ok := env[key]; ok {
			return nil, fmt.Errorf("provenance %s: %q is told by the builder itself: %w", dir, key, errdefs.ErrInvalidArgument)
		}
	}
	return env, nil
}

func serveBuildkitd(cmd *cobra.Command, c buildkitdConfig) (err error) {
	ctx := cmd.Context()
	root, err := filepath.Abs(c.Root)
	if err != nil {
		return err
	}
	state := filepath.Join(root, "varve-state")
	env, err := readProvenanceEnv(first(c.ProvenanceEnvDir, buildkitdProvenance))
	if err != nil {
		return err
	}
	hosts, err := writeHosts(filepath.Join(state, "hosts"), c.Registry)
	if err != nil {
		return err
	}
	limits, err := c.Worker.OCI.limits(root)
	if err != nil {
		return err
	}
	k, err := daemon.Keep(ctx, daemon.Options{
		Root: filepath.Join(root, "varve"), State: state, Limits: limits, Entitlements: c.Entitlements, CDIDirs: c.CDI.SpecDirs, BuildLabels: c.Worker.OCI.Labels,
		ProvenanceEnv: env,
		Registry:      varve.Registry{HostsDir: hosts},
	}, func(line string) { fmt.Fprintln(cmd.ErrOrStderr(), "varve:", line) })
	if err != nil {
		return err
	}
	var servers []*daemon.Server
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		for _, s := range servers {
			err = errors.Join(err, s.Close(end))
		}
		err = errors.Join(err, k.Close(end))
	}()
	for _, addr := range c.GRPC.Address {
		path, err := daemon.SocketPath(addr)
		if err != nil {
			return err
		}
		s, err := daemon.Listen(path, k)
		if err != nil {
			return err
		}
		servers = append(servers, s)
		fmt.Fprintf(cmd.ErrOrStderr(), "varve: serving %s on %s as %s\n", c.Root, addr, buildkitdName)
	}
	if addr := c.GRPC.DebugAddress; addr != "" {
		debug, err := daemon.ServeDebug(addr, k)
		if err != nil {
			return err
		}
		defer debug.Close()
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-k.Failed():
		return err
	}
}

// writeHosts turns buildkitd's registries into containerd's hosts.toml, one
// folder for each, and returns the folder of all.
func writeHosts(dir string, registries map[string]buildkitdRegistry) (string, error) {
	if len(registries) == 0 {
		return "", nil
	}
	for name, r := range registries {
		text := ""
		scheme := "https"
		if r.HTTP != nil && *r.HTTP {
			scheme = "http"
		}
		server := name
		if name == "docker.io" {
			server = "registry-1.docker.io"
		}
		text += fmt.Sprintf("server = %q\n\n", scheme+"://"+server)
		for _, m := range r.Mirrors {
			text += hostEntry(mirrorURL(m, registries), []string{"pull", "resolve"}, registries[mirrorHost(m)])
		}
		text += hostEntry(scheme+"://"+server, []string{"pull", "resolve", "push"}, r)
		folder := filepath.Join(dir, name)
		if err := os.MkdirAll(folder, 0o700); err != nil {
			return "", fmt.Errorf("registry %s: %w: %w", name, err, errdefs.ErrUnavailable)
		}
		if err := os.WriteFile(filepath.Join(folder, "hosts.toml"), []byte(text), 0o600); err != nil {
			return "", fmt.Errorf("registry %s: %w: %w", name, err, errdefs.ErrUnavailable)
		}
	}
	return dir, nil
}

func mirrorHost(m string) string {
	host, _, _ := strings.Cut(m, "/")
	return host
}

// mirrorURL: a registry on this host speaks HTTP, unless something else is said.
func mirrorURL(m string, registries map[string]buildkitdRegistry) string {
	host, path, _ := strings.Cut(m, "/")
	name, _, _ := strings.Cut(host, ":")
	plain := slices.Contains([]string{"localhost", "127.0.0.1", "[::1]"}, name)
	if r, ok := registries[host]; ok && r.HTTP != nil {
		plain = *r.HTTP
	}
	url := "https://" + host
	if plain {
		url = "http://" + host
	}
	if path != "" {
		url += "/v2/" + path
	}
	return url
}

func hostEntry(url string, capabilities []string, r buildkitdRegistry) string {
	text := fmt.Sprintf("[host.%q]\n  capabilities = [", url)
	for i, c := range capabilities {
		if i > 0 {
			text += ", "
		}
		text += fmt.Sprintf("%q", c)
	}
	text += "]\n"
	if strings.Contains(strings.TrimPrefix(strings.TrimPrefix(url, "https://"), "http://"), "/") {
		text += "  override_path = true\n"
	}
	if r.Insecure != nil && *r.Insecure {
		text += "  skip_verify = true\n"
	}
	if len(r.CA) > 0 {
		text += fmt.Sprintf("  ca = [%q]\n", strings.Join(r.CA, `", "`))
	}
	if len(r.KeyPairs) > 0 {
		text += "  client = ["
		for i, p := range r.KeyPairs {
			if i > 0 {
				text += ", "
			}
			text += fmt.Sprintf("[%q, %q]", p.Cert, p.Key)
		}
		text += "]\n"
	}
	return text + "\n"
}
