package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"varve.dev/daemon"
)

func newQuarantine(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "quarantine",
		Short: "List or delete what repairs took out of the store for being damaged",
	}
	cmd.AddCommand(newQuarantineLs(g), newQuarantineRm(g))
	return cmd
}

func newQuarantineLs(g *globals) *cobra.Command {
	var asJSON, quiet bool
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List what is in quarantine",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				list, err := j.Quarantine(ctx)
				if err != nil {
					return err
				}
				if asJSON {
					data, err := json.Marshal(list)
					if err != nil {
						return err
					}
					return printJSON(cmd.OutOrStdout(), string(data))
				}
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
				if !quiet {
					fmt.Fprintln(w, "ID\tTAKEN\tOBJECT\tSIZE\tFINDINGS\tIMAGES")
				}
				for _, q := range list {
					if quiet {
						fmt.Fprintln(w, q.ID)
						continue
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n", q.ID, ago(q.When), q.Object,
						units.HumanSizeWithPrecision(float64(q.Bytes), 3), len(q.Found), strings.Join(q.Images, ", "))
				}
				return w.Flush()
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, with the findings")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only ids")
	return cmd
}

func newQuarantineRm(g *globals) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "rm [--all | ID...]",
		Short: "Delete from quarantine",
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return errUsage("quarantine rm: ids are needed, or --all")
			}
			return g.with(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				list, err := j.Quarantine(ctx)
				if err != nil {
					return err
				}
				ids, bytes := args, int64(0)
				for _, q := range list {
					if all {
						ids = append(ids, q.ID)
					}
					if slices.Contains(ids, q.ID) {
						bytes += q.Bytes
					}
				}
				if err := j.Discard(ctx, ids); err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "Deleted: %d, %s\n", len(ids), units.HumanSizeWithPrecision(float64(bytes), 3))
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "delete everything that is in quarantine")
	return cmd
}
