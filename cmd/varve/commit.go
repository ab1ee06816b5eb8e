package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"varve.dev/api/varve"
	"varve.dev/daemon"
)

func newCommit(g *globals) *cobra.Command {
	var req varve.CommitRequest
	cmd := &cobra.Command{
		Use:   "commit [OPTIONS] CONTAINER [NAME]",
		Short: "Make an image of what a container has written",
		Args:  cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Container = args[0]
			if len(args) > 1 {
				req.Name = args[1]
			}
			return g.with(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				made, err := j.Commit(ctx, req)
				if err == nil {
					fmt.Fprintln(cmd.OutOrStdout(), made.ID)
				}
				return err
			})
		},
	}
	cmd.Flags().StringVarP(&req.Author, "author", "a", "", "author of the image")
	cmd.Flags().StringVarP(&req.Message, "message", "m", "", "note for the image's history")
	return cmd
}
