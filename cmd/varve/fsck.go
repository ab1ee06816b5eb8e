package main

import (
	"context"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/layout"
)

// couldNotRun is fsck's exit code for a check that did not take place.
const couldNotRun = 3

func newFsck(g *globals) *cobra.Command {
	var deep, quick, asJSON, list bool
	var of foreignStore
	cmd := &cobra.Command{
		Use:   "fsck [OPTIONS]",
		Short: "Check the store, and say what is wrong where",
		Long: `Check the store, and say what is wrong where.

With --of-oci-layout, --of-docker or --of-containerd, check somebody else's
instead: no store of varve's is needed, and nothing is changed.

Exit codes: 0 clean, 1 found and repairable, 2 loss, 3 could not run.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if of.named(cmd) {
				return of.check(cmd, asJSON)
			}
			if list {
				return printLaw(cmd)
			}
			level := layout.Normal
			switch {
			case deep && quick:
				return errUsage("fsck: --deep and --quick exclude each other")
			case deep:
				level = layout.Deep
			case quick:
				level = layout.Quick
			}
			code := couldNotRun
			err := g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				show := newProgress(cmd.ErrOrStderr(), asJSON)
				report, err := j.Fsck(ctx, varve.FsckRequest{Level: string(level)}, show.event)
				show.finish()
				if err != nil {
					return err
				}
				code = report.ExitCode
				if asJSON {
					return printJSON(cmd.OutOrStdout(), string(report.Report))
				}
				_, err = fmt.Fprint(cmd.OutOrStdout(), report.Text)
				return err
			})
			if err != nil {
				fmt.Fprintln(cmd.ErrOrStderr(), "varve:", err)
			}
			if code != 0 {
				return exitError(code)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&deep, "deep", false, "read every byte: each blob against its digest, each file against its manifest")
	cmd.Flags().BoolVar(&quick, "quick", false, "compare only records and names")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the report as JSON")
	cmd.Flags().BoolVar(&list, "list", false, "print every invariant, its severity, its level and its repair")
	of.add(cmd)
	return cmd
}

func printLaw(cmd *cobra.Command) error {
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tSEVERITY\tLEVEL\tHOLDS\tREPAIR")
	for _, i := range layout.Invariants() {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", i.ID, i.Severity, i.Level, i.Holds, i.Repair)
	}
	return w.Flush()
}
