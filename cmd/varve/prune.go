package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"varve.dev/api/varve"
	"varve.dev/daemon"
)

func newImageGroup(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Prune images"}
	cmd.AddCommand(newPrune(g, prune{
		short: "Remove images that no container stands on", takesAll: "also those that have names, not only those without",
		warning: func(all bool) string {
			if all {
				return "all images that no container stands on"
			}
			return "all images without a name"
		},
		request: varve.PruneRequest{Images: true},
	}))
	return cmd
}

func newContainerGroup(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "container", Short: "Prune containers"}
	cmd.AddCommand(newPrune(g, prune{
		short: "Remove containers that do not run", warning: func(bool) string { return "all containers that do not run" },
		request: varve.PruneRequest{Containers: true},
	}))
	return cmd
}

func newBuilderGroup(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "builder", Short: "Show or prune the build cache"}
	cmd.AddCommand(newDf(g, "df"), newPrune(g, prune{
		short: "Remove build results and cache mounts that nothing uses", keeps: true,
		warning: func(bool) string { return "all build results and cache mounts that nothing uses" },
		request: varve.PruneRequest{Builder: true},
	}))
	return cmd
}

func newSystemGroup(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "system", Short: "Show or prune the store"}
	cmd.AddCommand(newDf(g, "df"), newPrune(g, prune{
		short: "Remove containers that do not run, images that none stands on, and the build cache", takesAll: "also images that have names",
		warning: func(all bool) string {
			images := "all images without a name"
			if all {
				images = "all images that no container stands on"
			}
			return "all containers that do not run, " + images + ", and all build results and cache mounts that nothing uses"
		},
		request: varve.PruneRequest{Containers: true, Images: true, Builder: true},
	}))
	return cmd
}

// prune is one of the commands that prune.
type prune struct {
	short    string
	takesAll string // what -a does; "" for none
	keeps    bool   // takes --keep-storage
	warning  func(all bool) string
	request  varve.PruneRequest
}

func newPrune(g *globals, p prune) *cobra.Command {
	var force, all bool
	var filters []string
	var keep string
	cmd := &cobra.Command{
		Use: "prune", Short: p.short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req := p.request
			req.All = all
			if err := addFilters(&req, filters, time.Now()); err != nil {
				return err
			}
			var err error
			if req.Keep, err = byteSize("--keep-storage", keep); err != nil {
				return err
			}
			if !force && !confirmed(cmd, p.warning(all)) {
				return nil
			}
			return g.with(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				show := newProgress(cmd.ErrOrStderr(), false)
				done, err := j.Prune(ctx, req, show.event)
				show.finish()
				printPruned(cmd.OutOrStdout(), done)
				return err
			})
		},
	}
	fl := cmd.Flags()
	fl.BoolVarP(&force, "force", "f", false, "do not ask")
	fl.StringArrayVar(&filters, "filter", nil, "until=TIME (24h, a date, seconds since 1970), label=KEY[=VALUE], label!=KEY[=VALUE]")
	if p.takesAll != "" {
		fl.BoolVarP(&all, "all", "a", false, p.takesAll)
	}
	if p.keeps {
		fl.BoolVarP(&all, "all", "a", false, "as docker's: there is nothing more to remove")
		fl.StringVar(&keep, "keep-storage", "", "size that stays, such as 5GB")
	}
	return cmd
}

// confirmed asks, as docker does.
func confirmed(cmd *cobra.Command, what string) bool {
	fmt.Fprintf(cmd.ErrOrStderr(), "This removes %s. Go on? [y/N] ", what)
	answer, _ := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
	return strings.EqualFold(strings.TrimSpace(answer), "y")
}

func printPruned(out io.Writer, done varve.Pruned) {
	for _, id := range done.Containers {
		fmt.Fprintln(out, "Removed container:", id)
	}
	for _, n := range done.Untagged {
		fmt.Fprintln(out, "Untagged:", n)
	}
	for _, d := range done.Deleted {
		fmt.Fprintln(out, "Deleted:", d)
	}
	if done.Results > 0 || done.Mounts > 0 {
		fmt.Fprintf(out, "Removed from the build cache: %d results, %d cache mounts\n", done.Results, done.Mounts)
	}
	fmt.Fprintln(out, "Total reclaimed space:", humanSize(done.Bytes))
}

// addFilters reads docker's filters.
func addFilters(req *varve.PruneRequest, filters []string, now time.Time) error {
	for _, f := range filters {
		key, value, ok := strings.Cut(f, "=")
		switch {
		case !ok || value == "":
			return errUsage("filter %q is not KEY=VALUE", f)
		case key == "until", key == "unused-for" && req.Builder:
			until, err := parseUntil(value, now)
			if err != nil {
				return err
			}
			req.Until = until
		case key == "label":
			req.Labels = append(req.Labels, value)
		case key == "label!":
			req.NotLabels = append(req.NotLabels, value)
		case key == "dangling" && req.Images && !req.Containers:
			dangling, err := strconv.ParseBool(value)
			if err != nil {
				return errUsage("filter %q: neither true nor false", f)
			}
			req.All = !dangling
		default:
			return errUsage("filter %q is not known: until, label and label! are", f)
		}
	}
	if req.Builder && !req.Images && (len(req.Labels) > 0 || len(req.NotLabels) > 0) {
		return errUsage("build results have no labels to filter by")
	}
	return nil
}

// parseUntil reads a duration before now, a date, or seconds since 1970 (Docker
// Engine API, "until").
func parseUntil(text string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil {
		return now.Add(-d), nil
	}
	if s, err := strconv.ParseFloat(text, 64); err == nil {
		return time.Unix(0, int64(s*1e9)), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, errUsage("until=%s is neither a duration nor a date", text)
}
