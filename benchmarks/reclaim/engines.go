package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"varve.dev/internal/testkit"
)

// errAbsent says that an engine is not installed, errUnknown that it has no such
// command.
var (
	errAbsent  = errors.New("not installed")
	errUnknown = errors.New("n/a")
)

// engine keeps images and containers.
type engine interface {
	name() string
	// start runs it with its root in dir.
	start(ctx context.Context, dir string) error
	// stop ends it. It may be called of one that has not started.
	stop() error
	// load brings an image, unpacked, and returns its name.
	load(ctx context.Context, img testkit.Image) (string, error)
	// removals are the ways to remove an image.
	removals() []removal
	// create makes a container, and returns how to remove it.
	create(ctx context.Context, image string) (remove func() error, err error)
	// uppers are the directories that the containers write to.
	uppers(ctx context.Context) ([]string, error)
	// usage asks what the disk holds; verbose, one by one. Errors: errUnknown.
	usage(ctx context.Context, verbose bool) error
}

// removal is a command that removes an image.
type removal struct {
	name string
	run  func(ctx context.Context, image string) error
}

const (
	startPatience = 30 * time.Second
	stopPatience  = time.Minute
)

// process is a daemon.
type process struct {
	dir  string
	pid  int
	done chan struct{} // closed when it has ended
}

// run starts a daemon and waits until it serves socket. It has a group of its own,
// so that a terminal's interrupt is ours to pass on, and ends with us: that needs
// a thread that stays, since the signal is sent when the thread ends.
func (p *process) run(ctx context.Context, dir, socket string, args ...string) error {
	p.dir, p.pid = dir, 0
	if _, err := exec.LookPath(args[0]); err != nil {
		return errAbsent
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	p.done = make(chan struct{})
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer close(p.done)
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stdout, cmd.Stderr = log, log
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		p.pid = cmd.Process.Pid
		started <- nil
		_ = cmd.Wait() // however it ends
	}()
	if err := <-started; err != nil {
		return err
	}
	for deadline := time.Now().Add(startPatience); ; {
		if c, err := net.Dial("unix", socket); err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.done:
		case <-time.After(20 * time.Millisecond):
			if time.Now().Before(deadline) {
				continue
			}
		}
		text, _ := os.ReadFile(log.Name())
		return fmt.Errorf("%s does not serve: %s", args[0], text)
	}
}

func (p *process) stop() error {
	if p.pid == 0 {
		return nil
	}
	_ = syscall.Kill(p.pid, syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(stopPatience):
	}
	_ = syscall.Kill(p.pid, syscall.SIGKILL)
	<-p.done
	return fmt.Errorf("did not end within %v of SIGTERM", stopPatience)
}

// output runs a command that has to go well.
func output(ctx context.Context, in io.Reader, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin = in
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}
