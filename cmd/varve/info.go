package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"runtime"

	"github.com/spf13/cobra"

	"varve.dev/daemon"
	"varve.dev/errdefs"
	"varve.dev/internal/version"
)

func newInfo(g *globals) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "info",
		Short: "Describe the store and whoever has it open",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				info, err := j.Info(ctx)
				if err != nil {
					return err
				}
				out := cmd.OutOrStdout()
				if asJSON {
					data, err := json.Marshal(info)
					if err != nil {
						return err
					}
					return printJSON(out, string(data))
				}
				owner := fmt.Sprintf("daemon, pid %d", info.PID)
				if info.Embedded {
					owner = fmt.Sprintf("command, pid %d", info.PID)
				}
				fmt.Fprintf(out, "Version:     %s\nRoot:        %s (%s)\nStore:       %s, format %d\nOpen in:     %s\nKernel:      %s\n",
					info.Version, info.Root, info.FileSys, info.StoreID, info.Format, owner, info.Kernel)
				fmt.Fprintf(out, "Images:      %d\nLayers:      %d\nBlobs:       %d\n", info.Images, info.Layers, info.Blobs)
				for _, r := range info.Recovered {
					fmt.Fprintf(out, "Recovered:   %s\n", r)
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "varve %s %s %s/%s\n", version.Version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}

// printJSON prints JSON indented, for people as much as for programs.
func printJSON(w io.Writer, data string) error {
	var out bytes.Buffer
	if err := json.Indent(&out, []byte(data), "", "  "); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInternal)
	}
	out.WriteByte('\n')
	_, err := out.WriteTo(w)
	return err
}
