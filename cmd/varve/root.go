package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/spf13/cobra"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/errdefs"
)

// The places used when nothing else is said.
const (
	defaultRoot   = "/var/lib/varve"
	defaultState  = "/run/varve"
	defaultConfig = "/etc/varve/config.toml"
)

// globals are the flags of every subcommand.
type globals struct {
	root, state, host, config string
	look                      bool // at the store before it is opened
}

// configFile is what the configuration file may say. Flags and environment
// variables come before it.
type configFile struct {
	Root     string `toml:"root"`
	State    string `toml:"state"`
	Host     string `toml:"host"`
	Registry struct {
		HostsDir  string   `toml:"hosts_dir"`  // folder of <host>/hosts.toml
		PlainHTTP []string `toml:"plain_http"` // registries to speak HTTP with
	} `toml:"registry"`
	GC      gcConfig    `toml:"gc"`
	Scrub   scrubConfig `toml:"scrub"`
	Metrics struct {
		Listen string `toml:"listen"` // host:port of this machine alone; they are on the daemon's socket too
	} `toml:"metrics"`
	Debug struct {
		Listen string `toml:"listen"` // unix:///path, or host:port of this machine alone: profiles of the daemon
	} `toml:"debug"`
}

// registry is how a daemon's builds talk to registries, unless their clients say.
func (c configFile) registry() varve.Registry {
	return varve.Registry{PlainHTTPHosts: c.Registry.PlainHTTP, HostsDir: c.Registry.HostsDir}
}

// scrubConfig is when a daemon makes a deep check by itself.
type scrubConfig struct {
	When   string `toml:"when"`   // "off", "weekly" (default), "continuous"
	Rate   string `toml:"rate"`   // a second, such as "50MB" (default 20MB)
	Repair bool   `toml:"repair"` // and make whole what it finds
}

// defaultScrubRate reads a terabyte in 14 hours.
const defaultScrubRate = 20_000_000

func (c scrubConfig) scrub() (s daemon.Scrub, err error) {
	s = daemon.Scrub{Rate: defaultScrubRate, Repair: c.Repair}
	switch c.When {
	case "off":
	case "", "weekly":
		s.Every = daemon.ScrubWeekly
	case "continuous":
		s.Every = daemon.ScrubContinuously
	default:
		return s, fmt.Errorf("scrub.when %q is not off, weekly or continuous: %w", c.When, errdefs.ErrInvalidArgument)
	}
	if c.Rate != "" {
		s.Rate, err = bytesPerSecond("scrub.rate", c.Rate)
	}
	return s, err
}

func newRoot() *cobra.Command {
	g := &globals{}
	cmd := &cobra.Command{
		Use:           "varve",
		Short:         "Build, pull, run and check container images on a store that survives power cuts",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	flags := cmd.PersistentFlags()
	flags.StringVar(&g.root, "root", "", "the store's directory (VARVE_ROOT; default "+defaultRoot+")")
	flags.StringVar(&g.state, "state", "", "directory for sockets and run-time state (VARVE_STATE; default "+defaultState+")")
	flags.StringVar(&g.host, "host", "", "socket of the daemon to use, unix:///path (VARVE_HOST)")
	flags.StringVar(&g.config, "config", "", "configuration file (TOML; default "+defaultConfig+" if it is there)")
	cmd.AddCommand(
		newPull(g), newPush(g), newImages(g), newRmi(g), newTag(g), newInspect(g), newHistory(g),
		newLoad(g), newSave(g), newBuild(g), newRun(g), newCommit(g), newFsck(g), newQuarantine(g), newInfo(g), newVersion(), newDaemon(g),
		newDf(g, "df"), newGC(g), newImageGroup(g), newContainerGroup(g), newBuilderGroup(g), newSystemGroup(g),
	)
	return cmd
}

// settings merges flags, environment, configuration file and defaults, in this
// order.
func (g *globals) settings() (configFile, error) {
	var c configFile
	path, optional := g.config, false
	if path == "" {
		path, optional = defaultConfig, true
	}
	meta, err := toml.DecodeFile(path, &c)
	if err != nil && !(optional && os.IsNotExist(err)) {
		return c, fmt.Errorf("configuration %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return c, fmt.Errorf("configuration %s: unknown setting %q: %w", path, unknown[0].String(), errdefs.ErrInvalidArgument)
	}
	c.Root = first(g.root, os.Getenv("VARVE_ROOT"), c.Root, defaultRoot)
	c.State = first(g.state, os.Getenv("VARVE_STATE"), c.State, defaultState)
	c.Host = first(g.host, os.Getenv("VARVE_HOST"), c.Host)
	return c, nil
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// leaveTimeout bounds how long a command that is done waits for background
// work and for guests.
const leaveTimeout = 24 * time.Hour

// leaveNotice is when somebody who waits for the end is told why.
const leaveNotice = 2 * time.Second

// again is with for what may be done twice: when the process that had the store
// open for this one is killed, another way to the store is looked for; when the
// database turns out damaged, it is tried with the one that is made anew.
func (g *globals) again(ctx context.Context, fn func(context.Context, *daemon.Joined) error) error {
	for {
		err := g.with(ctx, func(ctx context.Context, j *daemon.Joined) error {
			err := fn(ctx, j)
			if errors.Is(err, varve.ErrReopened) && ctx.Err() == nil {
				fmt.Fprintf(os.Stderr, "varve: %v; once more\n", err)
				err = fn(ctx, j)
			}
			return err
		})
		if !errors.Is(err, varve.ErrCutOff) || ctx.Err() != nil {
			return err
		}
		fmt.Fprintln(os.Stderr, "varve: the process that had the store open has ended; once more")
	}
}

// with joins the store, runs fn and lets go of it.
func (g *globals) with(ctx context.Context, fn func(context.Context, *daemon.Joined) error) error {
	c, err := g.settings()
	if err != nil {
		return err
	}
	limits, err := c.GC.limits()
	if err != nil {
		return err
	}
	j, err := daemon.Join(ctx, daemon.Place{Root: c.Root, State: c.State, Host: c.Host, Look: g.look, Limits: limits})
	if err != nil {
		return err
	}
	for _, line := range j.Notice {
		fmt.Fprintln(os.Stderr, "varve:", line)
	}
	err = fn(ctx, j)
	// An interrupt ends the work, not the orderly end.
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer cancel()
	notice := time.AfterFunc(leaveNotice, func() {
		fmt.Fprintln(os.Stderr, "varve: done; other commands use the store through this one, waiting for them")
	})
	defer notice.Stop()
	if cerr := j.Close(end); err == nil {
		err = cerr
	}
	return err
}

// registryFlags are common to what talks to a registry.
type registryFlags struct {
	plainHTTP bool
	hostsDir  string
}

func (f *registryFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.plainHTTP, "plain-http", false, "speak HTTP, not HTTPS, with the registry")
	cmd.Flags().StringVar(&f.hostsDir, "hosts-dir", "", "folder of <host>/hosts.toml, as containerd reads it")
}

func (f *registryFlags) registry(g *globals) (varve.Registry, error) {
	c, err := g.settings()
	return varve.Registry{
		PlainHTTP: f.plainHTTP, PlainHTTPHosts: c.Registry.PlainHTTP, HostsDir: first(f.hostsDir, c.Registry.HostsDir),
	}, err
}
