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
	"path/filepath"
	"syscall"
)

// exitError ends the command with a code and without a further message.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// stopped is why a command ends that was told to by a signal.
type stopped syscall.Signal

func (s stopped) Error() string { return "stopped by " + syscall.Signal(s).String() }

// untilStopped returns a context that ends with the first signal to stop. The
// second one ends the process.
func untilStopped() context.Context {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		s := (<-signals).(syscall.Signal)
		signal.Stop(signals)
		cancel(stopped(s))
	}()
	return ctx
}

func main() {
	ctx := untilStopped()
	cmd := newRoot()
	if filepath.Base(os.Args[0]) == buildkitdName {
		cmd = newBuildkitd()
	}
	err := cmd.ExecuteContext(ctx)
	var exit exitError
	var by stopped
	switch {
	case err == nil:
	case errors.As(err, &exit):
		os.Exit(int(exit))
	case errors.As(context.Cause(ctx), &by) && errors.Is(err, context.Canceled):
		fmt.Fprintln(os.Stderr, "varve:", by)
		os.Exit(128 + int(by)) // as a shell reports it
	default:
		fmt.Fprintln(os.Stderr, "varve:", err)
		os.Exit(1)
	}
}
