package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"varve.dev/layout"
	"varve.dev/runtime"
)

// stateDir is where libcontainer keeps its own notes while the container
// runs, in the container's directory.
const stateDir = "libcontainer"

// run runs the container in dir and returns its exit code. Whatever happens,
// exit.json says it.
func run(dir string) (int, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return runtime.CodeRuntime, err
	}
	spec, err := runtime.Load(dir)
	if err != nil {
		return runtime.CodeRuntime, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, layout.ContainerLock), os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return runtime.CodeRuntime, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return runtime.CodeRuntime, fmt.Errorf("container %s runs already: %w", spec.ID, err)
	}
	exit := runtime.Exit{Started: time.Now().UTC()}
	// Whoever measures what the container takes has to look again.
	if err := os.Chtimes(lock.Name(), exit.Started, exit.Started); err != nil {
		return runtime.CodeRuntime, fmt.Errorf("container %s: %w", spec.ID, err)
	}
	code, err := runSpec(dir, spec, false, &exit)
	exit.Code = code
	exit.Finished = time.Now().UTC()
	if err != nil {
		exit.Error = err.Error()
	}
	return code, errors.Join(err, exit.Save(dir))
}

// runStep runs a build step, whose spec and exit are in memory.
func runStep(dir string) (int, error) {
	for _, fd := range []int{runtime.StepLifeline, runtime.StepSpec, runtime.StepExit} {
		unix.CloseOnExec(fd)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return runtime.CodeRuntime, err
	}
	spec, err := runtime.ReadSpec(os.NewFile(runtime.StepSpec, "spec"))
	if err != nil {
		return runtime.CodeRuntime, err
	}
	exit := runtime.Exit{Started: time.Now().UTC()}
	code, err := runSpec(dir, spec, true, &exit)
	exit.Code = code
	exit.Finished = time.Now().UTC()
	if err != nil {
		exit.Error = err.Error()
	}
	return code, errors.Join(err, json.NewEncoder(os.NewFile(runtime.StepExit, "exit")).Encode(exit))
}

func runSpec(dir string, spec *runtime.Spec, lifeline bool, exit *runtime.Exit) (int, error) {
	rootfs, err := mountRootfs(dir, spec)
	if err != nil {
		return runtime.CodeRuntime, err
	}
	if err := errors.Join(mountOverlays(dir, spec), mountSecrets(dir, spec)); err != nil {
		return runtime.CodeRuntime, err
	}
	// The mounts are this process's own and end with it.
	stubs := makeStubs(rootfs, spec)
	config, process, err := configure(rootfs, spec)
	if err != nil {
		return runtime.CodeRuntime, err
	}
	if err := os.Mkdir(filepath.Join(dir, stateDir), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return runtime.CodeRuntime, err
	}
	container, err := libcontainer.Create(filepath.Join(dir, stateDir), spec.ID, config)
	if err != nil {
		return runtime.CodeRuntime, fmt.Errorf("create container: %w", err)
	}
	code, err := start(container, process, spec, lifeline, exit)
	if derr := destroy(container); err == nil && derr != nil {
		err = fmt.Errorf("clean up: %w", derr)
	}
	return code, errors.Join(err, removeStubs(rootfs, stubs), os.RemoveAll(filepath.Join(dir, stateDir)))
}

// start runs the process to its end.
func start(c *libcontainer.Container, p *libcontainer.Process, spec *runtime.Spec, lifeline bool, exit *runtime.Exit) (int, error) {
	// Signals that come before the container is there wait in the channel.
	signals := make(chan os.Signal, 32)
	signal.Notify(signals)
	defer signal.Stop(signals)

	tty, err := attach(p, spec)
	if err != nil {
		return runtime.CodeRuntime, err
	}
	if err := c.Run(p); err != nil {
		tty.close()
		return startCode(err), fmt.Errorf("start %q: %w", p.Args[0], err)
	}
	if err := tty.start(); err != nil {
		_ = c.Signal(unix.SIGKILL)
		_, _ = p.Wait()
		return runtime.CodeRuntime, err
	}
	defer tty.close()
	if lifeline {
		go func() {
			_, _ = io.Copy(io.Discard, os.NewFile(runtime.StepLifeline, "lifeline"))
			_ = c.Signal(unix.SIGKILL)
		}()
	}
	go forward(signals, p, tty)
	state, err := p.Wait()
	if state == nil {
		return runtime.CodeRuntime, fmt.Errorf("wait: %w", err)
	}
	exit.OOMKilled = oomKilled(c)
	status := state.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		exit.Signal = int(status.Signal())
		return 128 + exit.Signal, nil
	}
	return status.ExitStatus(), nil
}

// startCode is docker's code for a program that could not be started.
func startCode(err error) int {
	text := err.Error()
	switch {
	case strings.Contains(text, "executable file not found"), strings.Contains(text, "no such file or directory"):
		return runtime.CodeNotFound
	case strings.Contains(text, "permission denied"), strings.Contains(text, "exec format error"), strings.Contains(text, "is a directory"):
		return runtime.CodeNotExecutable
	}
	return runtime.CodeRuntime
}

// oomKilled tells whether the kernel killed anything in the container for want
// of memory, as far as its cgroup counts that. It must still be there.
func oomKilled(c *libcontainer.Container) bool {
	config := c.Config()
	m, err := manager.New(config.Cgroups)
	if err != nil {
		return false
	}
	n, err := m.OOMKillCount()
	return err == nil && n > 0
}

// forward hands signals on to the container's first process.
func forward(signals <-chan os.Signal, p *libcontainer.Process, tty *terminal) {
	for s := range signals {
		switch s {
		case unix.SIGCHLD, unix.SIGURG, unix.SIGPIPE:
			// About this process: its children, the Go scheduler, a
			// reader that went away.
		case unix.SIGWINCH:
			tty.resize()
		default:
			_ = p.Signal(s)
		}
	}
}

// destroyTries bounds the wait for the kernel to let go of a cgroup whose last
// process has just died.
const destroyTries = 50

func destroy(c *libcontainer.Container) error {
	var err error
	for range destroyTries {
		if err = c.Destroy(); err == nil {
			return nil
		}
		_ = c.Signal(unix.SIGKILL)
		time.Sleep(10 * time.Millisecond)
	}
	return err
}
