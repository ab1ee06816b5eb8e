package main

import (
	"context"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/errdefs"
)

func newImages(g *globals) *cobra.Command {
	var quiet, digests bool
	cmd := &cobra.Command{
		Use:   "images",
		Short: "List images",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				list, err := j.List(ctx)
				if err != nil {
					return err
				}
				if quiet {
					for _, i := range list {
						fmt.Fprintln(cmd.OutOrStdout(), shortID(i.ID))
					}
					return nil
				}
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
				head := "NAME\tIMAGE ID\tCREATED\tSIZE"
				if digests {
					head = "NAME\tDIGEST\tIMAGE ID\tCREATED\tSIZE"
				}
				fmt.Fprintln(w, head)
				for _, i := range list {
					fmt.Fprintf(w, "%s\t", i.Name)
					if digests {
						fmt.Fprintf(w, "%s\t", i.Digest)
					}
					fmt.Fprintf(w, "%s\t%s\t%s\n", shortID(i.ID), ago(i.Created), units.HumanSizeWithPrecision(float64(i.Size), 3))
				}
				return w.Flush()
			})
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only image ids")
	cmd.Flags().BoolVar(&digests, "digests", false, "print the digests of manifests")
	return cmd
}

// shortID is the twelve digits that docker shows.
func shortID(id string) string {
	_, hex, found := strings.Cut(id, ":")
	if !found {
		hex = id
	}
	return hex[:min(12, len(hex))]
}

func ago(t time.Time) string {
	if t.IsZero() || t.Unix() <= 0 {
		return "N/A" // images made reproducibly carry no time
	}
	return units.HumanDuration(time.Since(t)) + " ago"
}

func newRmi(g *globals) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rmi [OPTIONS] IMAGE...",
		Short: "Remove images",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				for _, name := range args {
					r, err := j.Remove(ctx, varve.RemoveRequest{Name: name, Force: force})
					if err != nil {
						return err
					}
					for _, n := range r.Untagged {
						fmt.Fprintln(cmd.OutOrStdout(), "Untagged:", n)
					}
					for _, d := range r.Deleted {
						fmt.Fprintln(cmd.OutOrStdout(), "Deleted:", d)
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "remove an image by its id with all of its names")
	return cmd
}

func newTag(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "tag SOURCE TARGET",
		Short: "Give an image another name",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				return j.Tag(ctx, varve.TagRequest{Source: args[0], Target: args[1]})
			})
		},
	}
}

func newInspect(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "inspect IMAGE...",
		Short: "Print all that is known of images, as JSON",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				var all []string
				for _, name := range args {
					data, err := j.Inspect(ctx, name)
					if err != nil {
						return err
					}
					all = append(all, string(data))
				}
				return printJSON(cmd.OutOrStdout(), "["+strings.Join(all, ",")+"]")
			})
		},
	}
}

func newHistory(g *globals) *cobra.Command {
	var noTrunc bool
	cmd := &cobra.Command{
		Use:   "history IMAGE",
		Short: "Show the steps that an image was made by",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				entries, err := j.History(ctx, args[0])
				if err != nil {
					return err
				}
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
				fmt.Fprintln(w, "CREATED\tCREATED BY\tSIZE\tCOMMENT")
				for _, e := range entries {
					by := e.CreatedBy
					if r := []rune(by); !noTrunc && len(r) > 45 {
						by = string(r[:44]) + "…"
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", ago(e.Created), by, units.HumanSizeWithPrecision(float64(e.Size), 3), e.Comment)
				}
				return w.Flush()
			})
		},
	}
	cmd.Flags().BoolVar(&noTrunc, "no-trunc", false, "print commands whole")
	return cmd
}

// errUsage marks what the caller has to write differently.
func errUsage(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}
