// Command varve builds, pulls, runs and checks container images on a store
// that survives power cuts.
//
// One file for each subcommand; they parse, call a varve.Backend and print.
// Without a daemon the store is opened in this process (see daemon.Join).
// Start reading at root.go.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// exitError ends the command with a code and without a further message.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newRoot().ExecuteContext(ctx)
	interrupted := ctx.Err() != nil
	stop()
	var exit exitError
	switch {
	case err == nil:
	case errors.As(err, &exit):
		os.Exit(int(exit))
	case interrupted && errors.Is(err, context.Canceled):
		fmt.Fprintln(os.Stderr, "varve: interrupted")
		os.Exit(130) // as a shell reports SIGINT
	default:
		fmt.Fprintln(os.Stderr, "varve:", err)
		os.Exit(1)
	}
}
