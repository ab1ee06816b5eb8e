package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"varve.dev/api/varve"
	"varve.dev/daemon"
)

func newPull(g *globals) *cobra.Command {
	var reg registryFlags
	var platform string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "pull [OPTIONS] NAME[:TAG|@DIGEST]",
		Short: "Pull an image from its registry",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			registry, err := reg.registry(g)
			if err != nil {
				return err
			}
			req := varve.PullRequest{Reference: args[0], Platform: platform, Registry: registry}
			return g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				show := newProgress(cmd.ErrOrStderr(), quiet)
				image, err := j.Pull(ctx, req, show.event)
				show.finish()
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s\n", image.Name)
				if !quiet {
					fmt.Fprintf(cmd.OutOrStdout(), "Digest: %s\n", image.Digest)
				}
				return nil
			})
		},
	}
	reg.add(cmd)
	cmd.Flags().StringVar(&platform, "platform", "", "platform to pull, such as linux/arm64 (default: this host's)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only the image's name")
	return cmd
}

func newPush(g *globals) *cobra.Command {
	var reg registryFlags
	var quiet bool
	cmd := &cobra.Command{
		Use:   "push [OPTIONS] NAME[:TAG]",
		Short: "Push an image to its registry",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			registry, err := reg.registry(g)
			if err != nil {
				return err
			}
			req := varve.PushRequest{Reference: args[0], Registry: registry}
			return g.again(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				show := newProgress(cmd.ErrOrStderr(), quiet)
				r, err := j.Push(ctx, req, show.event)
				show.finish()
				if err == nil {
					fmt.Fprintf(cmd.OutOrStdout(), "%s: digest: %s size: %d\n", args[0], r.Digest, r.Size)
				}
				return err
			})
		},
	}
	reg.add(cmd)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}
