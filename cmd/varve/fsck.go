package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/layout"
)

// couldNotRun is fsck's exit code for a check that did not take place.
const couldNotRun = 3

func newFsck(g *globals) *cobra.Command {
	var deep, quick, asJSON, list, repair, dryRun, resume bool
	var rate, sample string
	var registry registryFlags
	var of foreignStore
	cmd := &cobra.Command{
		Use:   "fsck [OPTIONS] [IMAGE | CONTAINER | LAYER | BLOB...]",
		Short: "Check the store, say what is wrong where, and repair it",
		Long: `Check the store, or what is named of it with all that it stands on, say what
is wrong where, and repair it.

With --repair, what is wrong is made whole from the store's own copies or from
the registries that it came from, while the store is in use, and then checked
again. What was bad is kept in the store's quarantine folder. With --dry-run
the plan is printed and nothing is done.

With --of-oci-layout, --of-docker or --of-containerd, check somebody else's
instead: no store of varve's is needed, and nothing is changed.

Exit codes: 0 clean, 1 found and repairable, 2 loss, 3 could not run.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if of.named(cmd) {
				if len(args) > 0 {
					return errUsage("fsck: of another engine's store nothing can be chosen")
				}
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
			reach, err := registry.registry(g)
			if err != nil {
				return err
			}
			request := varve.FsckRequest{Level: string(level), Of: args, Repair: repair && !dryRun, Plan: dryRun, Resume: resume, Registry: reach}
			if sample != "" {
				if request.Sample, err = share(sample); err != nil {
					return err
				}
			}
			switch {
			case level != layout.Deep && (resume || sample != ""):
				return errUsage("fsck: --resume and --sample are for --deep")
			case resume && (sample != "" || len(args) > 0):
				return errUsage("fsck: --resume goes on with what was begun; nothing can be chosen anew")
			}
			if rate != "" {
				if request.Rate, err = bytesPerSecond("fsck: --rate", rate); err != nil {
					return err
				}
			}
			code := couldNotRun
			check := func(ctx context.Context, run checkFunc) error {
				show := newProgress(cmd.ErrOrStderr(), asJSON)
				report, err := run(ctx, request, show.event)
				show.finish()
				if err != nil {
					return err
				}
				code = report.ExitCode
				if asJSON {
					return printFsckJSON(cmd, report)
				}
				_, err = fmt.Fprint(cmd.OutOrStdout(), report.Text)
				return err
			}
			g.look = true
			err = g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error { return check(ctx, j.Fsck) })
			if err != nil && code == couldNotRun {
				// What keeps the store from being opened may be what the
				// check is for.
				cerr := check(cmd.Context(), g.checkClosed)
				if cerr == nil && code == 0 {
					code = couldNotRun
				}
			}
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
	cmd.Flags().BoolVar(&repair, "repair", false, "make whole what is found, and check again")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print what --repair would do")
	cmd.Flags().StringVar(&rate, "rate", "", "read at most this many bytes a second, such as 50MB")
	cmd.Flags().StringVar(&sample, "sample", "", "of the contents, read only this share, drawn anew each time, such as 5%")
	cmd.Flags().BoolVar(&resume, "resume", false, "go on with the deep check that was cut off; if none was, begin one")
	registry.add(cmd)
	cmd.Flags().BoolVar(&list, "list", false, "print every invariant, its severity, its level and what that costs, and its repair")
	of.add(cmd)
	return cmd
}

// bytesPerSecond reads "50MB", the value of a flag or setting.
func bytesPerSecond(of, s string) (int64, error) {
	rate, err := units.FromHumanSize(s)
	if err != nil || rate <= 0 {
		return 0, errUsage("%s %q is no number of bytes a second, such as 50MB", of, s)
	}
	return rate, nil
}

// share reads "5%" or "0.05".
func share(s string) (float64, error) {
	number, percent := strings.CutSuffix(s, "%")
	f, err := strconv.ParseFloat(number, 64)
	if percent {
		f /= 100
	}
	if err != nil || !(f > 0 && f <= 1) {
		return 0, errUsage("fsck: --sample %q is no share, such as 5%%", s)
	}
	return f, nil
}

// printFsckJSON prints the report, and beside it the plan if one was made.
func printFsckJSON(cmd *cobra.Command, r varve.FsckReport) error {
	if r.Plan == nil {
		return printJSON(cmd.OutOrStdout(), string(r.Report))
	}
	data, err := json.Marshal(map[string]json.RawMessage{"report": r.Report, "plan": r.Plan})
	if err != nil {
		return err
	}
	return printJSON(cmd.OutOrStdout(), string(data))
}

type checkFunc = func(context.Context, varve.FsckRequest, func(varve.Event)) (varve.FsckReport, error)

// checkClosed checks a store that nobody has open, as it is.
func (g *globals) checkClosed(ctx context.Context, req varve.FsckRequest, progress func(varve.Event)) (varve.FsckReport, error) {
	c, err := g.settings()
	if err != nil {
		return varve.FsckReport{}, err
	}
	if c.Host != "" {
		return varve.FsckReport{}, errUsage("fsck: the store of another host cannot be checked without it")
	}
	return daemon.CheckClosed(ctx, c.Root, req, progress)
}

func printLaw(cmd *cobra.Command) error {
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tSEVERITY\tLEVEL\tHOLDS\tREPAIR")
	for _, i := range layout.Invariants() {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", i.ID, i.Severity, i.Level, i.Holds, i.Repair)
	}
	for _, l := range layout.Levels() {
		fmt.Fprintf(w, "\n%s reads %s", l, l.Cost())
	}
	fmt.Fprintln(w)
	return w.Flush()
}
