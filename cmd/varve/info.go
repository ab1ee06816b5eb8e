package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"varve.dev/api/varve"
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
				if info.Checked != nil {
					fmt.Fprintf(out, "Checked:     %s\n", tellCheck(*info.Checked))
				}
				for _, c := range info.Checking {
					fmt.Fprintf(out, "Checking:    %s\n", tellCheck(c))
				}
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

// tellCheck describes a deep check in a line.
func tellCheck(c varve.Check) string {
	what := "the store"
	if len(c.Of) > 0 {
		what = strings.Join(c.Of, ", ")
	}
	if c.Sample > 0 {
		what = fmt.Sprintf("%g%% of %s", c.Sample*100, what)
	}
	if c.Background {
		what += ", in the background"
	}
	if c.Finished.IsZero() {
		return fmt.Sprintf("%s, since %s, %s read", what, c.Started.Local().Format(time.DateTime), units.HumanSize(float64(c.Bytes)))
	}
	verdict := "clean"
	switch {
	case c.Findings > c.Healed:
		verdict = fmt.Sprintf("%d findings, %d losses, %d healed: see varve fsck --deep", c.Findings, c.Losses, c.Healed)
	case c.Findings > 0:
		verdict = fmt.Sprintf("%d findings, all healed", c.Findings)
	}
	return fmt.Sprintf("%s, %s, %s", what, c.Finished.Local().Format(time.DateTime), verdict)
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
