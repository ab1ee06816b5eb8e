package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
)

// shimName is the file name of the shim's binary.
const shimName = "varve-runtime"

// FindShim returns the path of the shim: what VARVE_RUNTIME names, the one
// beside this program, or the one in PATH. Errors: ErrNotFound.
func FindShim() (string, error) {
	if path := os.Getenv("VARVE_RUNTIME"); path != "" {
		return path, nil
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), shimName)
		if fi, err := os.Stat(beside); err == nil && fi.Mode().IsRegular() {
			return beside, nil
		}
	}
	path, err := exec.LookPath(shimName)
	if err != nil {
		return "", fmt.Errorf("%s is neither beside this program nor in PATH: %w", shimName, errdefs.ErrNotFound)
	}
	return path, nil
}

// command returns the shim of the container in dir, ready to be started with
// a mount namespace of its own, which package syscall makes private.
func command(shim, dir string, args ...string) *exec.Cmd {
	cmd := exec.Command(shim, append([]string{"run"}, append(args, dir)...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	return cmd
}

// forwarded are the signals that a foreground container gets instead of the
// command that runs it.
var forwarded = []os.Signal{
	unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2,
}

// Foreground runs the container in dir with this process's standard streams
// and signals, and returns its exit code. The shim, and the container with it,
// goes on if this process is killed.
func Foreground(shim, dir string) (int, error) {
	cmd := command(shim, dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start %s: %w: %w", shim, err, errdefs.ErrUnavailable)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			// What a terminal sends goes to the whole foreground group,
			// and so has reached the shim already.
			if !fromTerminal(s) {
				_ = cmd.Process.Signal(s)
			}
		case err := <-done:
			return exitCode(cmd, err)
		}
	}
}

// fromTerminal tells whether the signal is one that the keyboard makes while
// this process is in the terminal's foreground.
func fromTerminal(s os.Signal) bool {
	if s != unix.SIGINT && s != unix.SIGQUIT {
		return false
	}
	group, err := unix.IoctlGetInt(int(os.Stdin.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

func exitCode(cmd *exec.Cmd, err error) (int, error) {
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, fmt.Errorf("shim: %w: %w", err, errdefs.ErrUnavailable)
	}
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		return 0, fmt.Errorf("shim was ended by signal %s: %w", status.Signal(), errdefs.ErrAborted)
	}
	return status.ExitStatus(), nil
}

// Executor runs build steps: containers that live as long as the call.
type Executor struct {
	Shim string
	Dir  string // where the steps' directories are made
}

// killWait is how long a cancelled step's shim may take to end; it only has to
// kill and clean up.
const killWait = 30 * time.Second

// Streams are a step's standard streams. A nil In is an empty one; an *os.File
// is handed over as it is.
type Streams struct {
	In       *os.File
	Out, Err io.Writer
}

// The descriptors that a step's shim is given after the standard ones. Neither
// the spec nor the exit is ever on a disk.
const (
	StepLifeline = 3 + iota // at its end the step is killed
	StepSpec                // holds the spec
	StepExit                // takes the exit
)

// Run runs a step and returns what became of it. When ctx ends the step is
// killed with everything it started, and nothing of it is left when Run
// returns. The step ends too if this process dies.
func (x *Executor) Run(ctx context.Context, spec Spec, streams Streams) (Exit, error) {
	dir, err := os.MkdirTemp(x.Dir, "step-")
	if err != nil {
		return Exit{}, fmt.Errorf("step: %w: %w", err, errdefs.ErrUnavailable)
	}
	defer os.RemoveAll(dir)
	spec.Stdin = streams.In != nil
	if err := spec.Validate(); err != nil {
		return Exit{}, err
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return Exit{}, fmt.Errorf("step: %w: %w", err, errdefs.ErrInternal)
	}
	held, err := memoryFile("spec", data)
	if err != nil {
		return Exit{}, err
	}
	defer held.Close()
	record, err := memoryFile("exit", nil)
	if err != nil {
		return Exit{}, err
	}
	defer record.Close()
	lifeline, ours, err := os.Pipe()
	if err != nil {
		return Exit{}, fmt.Errorf("step: %w: %w", err, errdefs.ErrResourceExhausted)
	}
	defer ours.Close()
	cmd := command(x.Shim, dir, "--step")
	cmd.ExtraFiles = []*os.File{lifeline, held, record}
	last := &lastWords{to: streams.Err}
	cmd.Stdout, cmd.Stderr = streams.Out, last
	if streams.In != nil {
		cmd.Stdin = streams.In
	}
	if same(streams.Out, streams.Err) {
		cmd.Stdout = last // one stream stays one
	}
	cmd.SysProcAttr.Setsid = true // a terminal's signals are the build's, not the step's
	err = cmd.Start()
	lifeline.Close()
	if err != nil {
		return Exit{}, fmt.Errorf("start %s: %w: %w", x.Shim, err, errdefs.ErrUnavailable)
	}
	stop := context.AfterFunc(ctx, func() {
		ours.Close()
		time.AfterFunc(killWait, func() { _ = cmd.Process.Kill() })
	})
	defer stop()
	code, err := exitCode(cmd, cmd.Wait())
	if ctx.Err() != nil {
		return Exit{}, ctx.Err()
	}
	if err != nil {
		return Exit{}, err
	}
	var exit Exit
	if err := json.NewDecoder(io.NewSectionReader(record, 0, maxExit)).Decode(&exit); err != nil {
		return exit, fmt.Errorf("the shim ended with %d and could not record what became of the step: %s: %w", code, last.line(), errdefs.ErrUnavailable)
	}
	return exit, nil
}

// maxExit bounds what a shim says of an exit, in bytes.
const maxExit = 1 << 20

// memoryFile returns a file that is in memory alone, to be read from its
// beginning.
func memoryFile(name string, data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("varve-"+name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("step: %w: %w", err, errdefs.ErrResourceExhausted)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(data, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("step: %w: %w", err, errdefs.ErrResourceExhausted)
	}
	return f, nil
}

// lastWords hands a shim's standard error on and keeps its end: what the shim
// itself says comes after all that its container says.
type lastWords struct {
	to  io.Writer
	end []byte
}

// same tells whether two writers are one; some cannot be compared.
func same(a, b io.Writer) bool {
	defer func() { _ = recover() }()
	return a == b
}

// maxWords bounds what is kept.
const maxWords = 4096

func (l *lastWords) Write(p []byte) (int, error) {
	l.end = append(l.end, p...)
	l.end = l.end[max(0, len(l.end)-maxWords):]
	return l.to.Write(p)
}

// line is the last line.
func (l *lastWords) line() string {
	text := strings.TrimSpace(string(l.end))
	return text[strings.LastIndexByte(text, '\n')+1:]
}
