package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"varve.dev/api/varve"
	"varve.dev/daemon"
)

func newLoad(g *globals) *cobra.Command {
	var input string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "load [OPTIONS]",
		Short: "Load images from an OCI layout or a docker archive (tar, on standard input)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			in := cmd.InOrStdin()
			if input != "" {
				f, err := os.Open(input)
				if err != nil {
					return errUsage("load: %v", err)
				}
				defer f.Close()
				in = f
			} else if term.IsTerminal(int(os.Stdin.Fd())) {
				return errUsage("load: name an archive with --input, or redirect one to standard input")
			}
			return g.with(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error {
				show := newProgress(cmd.ErrOrStderr(), quiet)
				images, err := j.Load(ctx, in, show.event)
				show.finish()
				for _, i := range images {
					fmt.Fprintf(cmd.OutOrStdout(), "Loaded image: %s\n", i.Name)
				}
				return err
			})
		},
	}
	cmd.Flags().StringVarP(&input, "input", "i", "", "read from a file, not from standard input")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

func newSave(g *globals) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "save [OPTIONS] IMAGE...",
		Short: "Save images as an archive, docker's and an OCI layout at once (tar, on standard output)",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := varve.SaveRequest{Names: args}
			save := func(w io.Writer) error {
				return g.with(cmd.Context(), func(ctx context.Context, j *daemon.Joined) error { return j.Save(ctx, req, w) })
			}
			if output == "" {
				if term.IsTerminal(int(os.Stdout.Fd())) {
					return errUsage("save: name a file with --output, or redirect standard output")
				}
				return save(cmd.OutOrStdout())
			}
			return saveFile(output, save)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "write to a file, not to standard output")
	return cmd
}

// saveFile writes beside the file and renames: half an archive never has its
// name.
func saveFile(path string, save func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".varve-save-")
	if err != nil {
		return errUsage("save: %v", err)
	}
	defer os.Remove(f.Name())
	err = save(f)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Chmod(f.Name(), 0o600)
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	return err
}
