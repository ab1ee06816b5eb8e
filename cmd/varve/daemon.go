package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"varve.dev/daemon"
)

// shutdownTimeout is how long a daemon that was told to end waits for calls
// under way. What is cut off then is resumed or rolled back at the next start.
const shutdownTimeout = 30 * time.Second

func newDaemon(g *globals) *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Keep the store open and serve it on a socket",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.settings()
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			socket := filepath.Join(c.State, daemon.DaemonSocket)
			if listen != "" {
				if socket, err = daemon.SocketPath(listen); err != nil {
					return err
				}
			}
			scrub, err := c.Scrub.scrub()
			if err != nil {
				return err
			}
			limits, err := c.GC.limits()
			if err != nil {
				return err
			}
			k, err := daemon.Keep(ctx, daemon.Options{Root: c.Root, State: c.State, Limits: limits, Scrub: scrub, Registry: c.registry()}, func(line string) {
				fmt.Fprintln(cmd.ErrOrStderr(), "varve:", line)
			})
			if err != nil {
				return err
			}
			for _, line := range k.Rebuilt() {
				fmt.Fprintln(cmd.ErrOrStderr(), "varve:", line)
			}
			server, err := daemon.Listen(socket, k)
			if err != nil {
				return errors.Join(err, k.Close(ctx))
			}
			if c.Metrics.Listen != "" {
				metrics, err := daemon.ServeMetrics(c.Metrics.Listen, k)
				if err != nil {
					return errors.Join(err, server.Close(ctx), k.Close(ctx))
				}
				defer metrics.Close()
			}
			if c.Debug.Listen != "" {
				debug, err := daemon.ServeDebug(c.Debug.Listen, k)
				if err != nil {
					return errors.Join(err, server.Close(ctx), k.Close(ctx))
				}
				defer debug.Close()
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "varve: serving %s on unix://%s\n", c.Root, socket)
			select {
			case <-ctx.Done():
			case err = <-k.Failed():
			}
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
			defer cancel()
			return errors.Join(err, server.Close(end), k.Close(end))
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "socket to serve on, unix:///path (default: "+daemon.DaemonSocket+" in the state directory)")
	return cmd
}
