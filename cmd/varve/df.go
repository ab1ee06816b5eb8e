package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"varve.dev/api/varve"
	"varve.dev/daemon"
)

func newDf(g *globals, name string) *cobra.Command {
	var verbose, measure, asJSON bool
	cmd := &cobra.Command{
		Use:   name,
		Short: "Show what the store takes of its disk",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				u, err := j.DiskUsage(ctx, varve.DiskUsageRequest{Verbose: verbose, Measure: measure})
				if err != nil {
					return err
				}
				if asJSON {
					data, err := json.Marshal(u)
					if err != nil {
						return err
					}
					return printJSON(cmd.OutOrStdout(), string(data))
				}
				return printUsage(cmd.OutOrStdout(), u, verbose)
			})
		},
	}
	fl := cmd.Flags()
	fl.BoolVarP(&verbose, "verbose", "v", false, "also one by one")
	fl.BoolVar(&measure, "measure", false, "measure now what containers and steps have written")
	fl.BoolVar(&asJSON, "json", false, "print JSON, in bytes")
	return cmd
}

func printUsage(out io.Writer, u varve.DiskUsage, verbose bool) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "WHAT\tCOUNT\tSIZE\tRECLAIMABLE")
	images := "-" // takes a look at each image
	if verbose {
		images = humanSize(u.Images.Reclaimable)
	}
	row := func(what string, of varve.Usage, reclaimable string) {
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", what, of.Count, humanSize(of.Bytes), reclaimable)
	}
	row("Images", u.Images, images)
	row("Containers", u.Containers, "-")
	row("Volumes", u.Volumes, "-")
	row("Build cache", u.Cache, humanSize(u.Cache.Reclaimable))
	row("Cache mounts", u.CacheMounts, humanSize(u.CacheMounts.Reclaimable))
	row("Quarantine", u.Quarantine, humanSize(u.Quarantine.Reclaimable))
	row("Trash", u.Trash, "being deleted")
	line := func(what string, n int64) { fmt.Fprintf(w, "%s\t\t%s\t\n", what, humanSize(n)) }
	line("Cut-off downloads", u.Unfinished)
	line("In flight", u.InFlight)
	line("Metadata", u.Metadata)
	line("Directories", u.Fixed)
	line("Total", u.Total)
	line("Free", u.Free)
	if err := w.Flush(); err != nil || !verbose {
		return err
	}
	return printEach(out, u)
}

func printEach(out io.Writer, u varve.DiskUsage) error {
	section := func(title, head string, n int, row func(w io.Writer, i int)) error {
		fmt.Fprintf(out, "\n%s\n", title)
		w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
		fmt.Fprintln(w, head)
		for i := range n {
			row(w, i)
		}
		return w.Flush()
	}
	err := section(fmt.Sprintf("Images (blobs that a registry can serve again: %s)", humanSize(u.Again)), "NAME\tCREATED\tSIZE\tUNIQUE\tSHARED\tCONTAINERS", len(u.EachImage), func(w io.Writer, n int) {
		i := u.EachImage[n]
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\n", strings.Join(i.Names, ", "), ago(i.Created), humanSize(i.Bytes), humanSize(i.Unique), humanSize(i.Shared), i.InUse)
	})
	dirs := func(title string, all []varve.DirUsage) error {
		return section(title, "ID\tNAME\tSIZE\tINODES\tMEASURED", len(all), func(w io.Writer, n int) {
			d := all[n]
			measured := "never"
			if !d.When.IsZero() {
				measured = time.Since(d.When).Round(time.Second).String() + " ago"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", shortID(d.ID), d.Name, humanSize(d.Bytes), d.Inodes, measured)
		})
	}
	if err == nil {
		err = dirs("Containers", u.EachContainer)
	}
	if err == nil {
		err = dirs("Cache mounts", u.EachMount)
	}
	if err != nil {
		return err
	}
	return section("Build cache", "LAST USED\tUSES\tSIZE\tIN USE\tSTEP", len(u.EachResult), func(w io.Writer, n int) {
		r := u.EachResult[n]
		fmt.Fprintf(w, "%s\t%d\t%s\t%t\t%s\n", ago(r.LastUse), r.Uses, humanSize(r.Bytes), r.InUse, r.Description)
	})
}
