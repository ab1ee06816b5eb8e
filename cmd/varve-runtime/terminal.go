package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/containerd/console"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/utils"
	"golang.org/x/sys/unix"

	"varve.dev/runtime"
)

// terminal is the container's terminal, and this process's own that shows it.
// A nil one is for containers without.
type terminal struct {
	ours   console.Console // the caller's; in raw mode while the container reads it
	master console.Console
	parent *os.File
	input  bool // what is typed goes to the container
	copied sync.WaitGroup
}

// attach gives the process its standard streams.
func attach(p *libcontainer.Process, spec *runtime.Spec) (*terminal, error) {
	if !spec.Terminal {
		p.Stdout, p.Stderr = os.Stdout, os.Stderr
		p.Stdin = os.Stdin
		if !spec.Stdin {
			null, err := os.Open(os.DevNull)
			if err != nil {
				return nil, err
			}
			p.Stdin = null
		}
		return nil, nil
	}
	ours, err := console.ConsoleFromFile(os.Stdin)
	if err != nil {
		return nil, fmt.Errorf("the container wants a terminal, and standard input is none: %w", err)
	}
	parent, child, err := utils.NewSockPair("console")
	if err != nil {
		return nil, err
	}
	p.ConsoleSocket = child
	if size, err := ours.Size(); err == nil {
		p.ConsoleWidth, p.ConsoleHeight = size.Width, size.Height
	}
	return &terminal{ours: ours, parent: parent, input: spec.Stdin}, nil
}

// start receives the container's end and copies both ways.
func (t *terminal) start() error {
	if t == nil {
		return nil
	}
	f, err := utils.RecvFile(t.parent) //nolint:staticcheck // runc has no public successor yet
	if err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	if t.master, err = console.ConsoleFromFile(f); err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	// The line discipline that the container's programs see is on the
	// other end; what comes from here passes through as it is.
	if err := console.ClearONLCR(t.master.Fd()); err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	t.resize()
	if t.input {
		if err := t.ours.SetRaw(); err != nil {
			return fmt.Errorf("terminal: %w", err)
		}
		go func() { _, _ = io.Copy(t.master, os.Stdin) }()
	}
	t.copied.Go(func() {
		// The end of the container shows as EIO here.
		if _, err := io.Copy(os.Stdout, t.master); err != nil && !errors.Is(err, unix.EIO) {
			fmt.Fprintln(os.Stderr, "varve-runtime: terminal:", err)
		}
	})
	return nil
}

func (t *terminal) resize() {
	if t != nil && t.master != nil {
		_ = t.master.ResizeFrom(t.ours)
	}
}

// close shows what is left and gives the caller's terminal back as it was.
func (t *terminal) close() {
	if t == nil {
		return
	}
	t.copied.Wait()
	_ = t.ours.Reset()
	t.parent.Close()
}
