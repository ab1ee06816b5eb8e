// Package bench is what the benchmarks beside other engines share: daemons with
// directories of their own that end with the benchmark, samples and tables.
package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/internal/testkit"
)

// Bench is a directory, and what has to be ended and cleaned up when a question
// is answered or not.
type Bench struct {
	Dir  string
	ends []func() error // the last first
}

// New makes a directory in another, which goes with everything in it at the end.
func New(in, prefix string) (*Bench, error) {
	dir, err := os.MkdirTemp(in, prefix)
	if err != nil {
		return nil, err
	}
	return Within(dir), nil
}

// Within is a Bench in a directory that is there, which goes at the end.
func Within(dir string) *Bench {
	return &Bench{Dir: dir, ends: []func() error{
		func() error { return os.RemoveAll(dir) },
		func() error { return unmountBelow(dir) },
	}}
}

// AtEnd has something done at the end, before what was asked for earlier.
func (b *Bench) AtEnd(end func() error) { b.ends = append(b.ends, end) }

// End ends everything, the last first.
func (b *Bench) End() (err error) {
	for _, end := range slices.Backward(b.ends) {
		err = errors.Join(err, end())
	}
	b.ends = nil
	return err
}

// unmountBelow unmounts what the daemons left mounted, the innermost first.
func unmountBelow(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for _, line := range slices.Backward(slices.Collect(strings.Lines(string(mounts)))) {
		fields := strings.Fields(line)
		if len(fields) < 2 || !strings.HasPrefix(fields[1], dir+"/") {
			continue
		}
		if unix.Unmount(fields[1], 0) != nil {
			err = errors.Join(err, unix.Unmount(fields[1], unix.MNT_DETACH))
		}
	}
	return err
}

// Mkdir makes a directory in the bench's own.
func (b *Bench) Mkdir(name string) (string, error) {
	dir := filepath.Join(b.Dir, name)
	return dir, os.MkdirAll(dir, 0o711)
}

// Start runs a daemon until the end, and waits until it answers. An interrupt
// from the terminal does not reach it: it is ended after the work.
func (b *Bench) Start(ctx context.Context, cmd *exec.Cmd, answers func() error) error {
	var log testkit.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait() // it is told to end; its log says what went wrong
		close(done)
	}()
	b.AtEnd(func() error {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-done:
			return nil
		case <-time.After(time.Minute):
		}
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-done
		return fmt.Errorf("%s did not end and was killed", cmd.Args[0])
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		err := answers()
		if err == nil {
			return nil
		}
		select {
		case <-done:
			return fmt.Errorf("%s has ended: %s", cmd.Args[0], log.String())
		case <-ctx.Done():
			return ctx.Err()
		default:
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s does not answer: %w: %s", cmd.Args[0], err, log.String())
		}
	}
}

// Output runs a command that has to go well. It ends with ctx.
func Output(ctx context.Context, env []string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Env = append(os.Environ(), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	return out.String(), nil
}

// Registry serves images to all.
func (b *Bench) Registry(ctx context.Context) (*testkit.RegistryServer, error) {
	dir, err := b.Mkdir("registry")
	if err != nil {
		return nil, err
	}
	registry, err := testkit.StartRegistry(ctx, dir, "127.0.0.1:0")
	if err == nil {
		b.AtEnd(func() error { registry.Stop(); return nil })
	}
	return registry, err
}

// Busybox serves an image with busybox, and returns its name and the registry's
// address.
func (b *Bench) Busybox(ctx context.Context) (name, registry string, err error) {
	server, err := b.Registry(ctx)
	if err != nil {
		return "", "", err
	}
	image, err := testkit.MakeBusybox()
	if err == nil {
		err = image.Push(server.Addr, image.Name)
	}
	return server.Ref(image.Name), server.Addr, err
}

// Peer builds a peer, once per version, and returns the directory of its binaries.
func Peer(ctx context.Context, name string) (string, error) {
	dir, err := Output(ctx, nil, "scripts/peer", name)
	return strings.TrimSpace(dir), err
}

// Dockerd is the command of a dockerd with everything in a directory and without
// networks, and how its clients reach it.
func Dockerd(dir string) (cmd *exec.Cmd, host string) {
	host = "unix://" + filepath.Join(dir, "sock")
	return exec.Command("dockerd", "--data-root", filepath.Join(dir, "root"), "--exec-root", filepath.Join(dir, "exec"),
		"--pidfile", filepath.Join(dir, "pid"), "-H", host, "--storage-driver", "overlay2", "--bridge", "none",
		"--iptables=false", "--ip6tables=false", "-l", "error"), host
}

// Sleep waits, or returns the error of ctx.
func Sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
