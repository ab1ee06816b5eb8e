package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"

	"varve.dev/internal/testkit"
)

// typist is a person at a terminal with a command on it.
type typist struct {
	t      *testing.T
	master console.Console
	slave  *os.File
	cmd    *exec.Cmd

	mu   sync.Mutex
	seen bytes.Buffer
}

// sit starts cmd on a terminal of its own, of that size.
func sit(t *testing.T, cmd *exec.Cmd, width, height uint16) *typist {
	t.Helper()
	master, name, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := &typist{t: t, master: master, slave: slave, cmd: cmd}
	p.resize(width, height)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(p, master) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		slave.Close()
		master.Close()
	})
	return p
}

// Write takes what the terminal shows.
func (p *typist) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen.Write(b)
}

func (p *typist) resize(width, height uint16) {
	p.t.Helper()
	if err := p.master.Resize(console.WinSize{Width: width, Height: height}); err != nil {
		p.t.Fatal(err)
	}
}

func (p *typist) hit(keys string) {
	p.t.Helper()
	if _, err := p.master.Write([]byte(keys)); err != nil {
		p.t.Fatal(err)
	}
}

// await waits until the terminal shows text, and forgets what came before.
func (p *typist) await(text string) {
	p.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		p.mu.Lock()
		shown := p.seen.String()
		if at := strings.Index(shown, text); at >= 0 {
			p.seen.Next(at + len(text))
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		if time.Now().After(deadline) {
			p.t.Fatalf("%q is not shown; there is %q", text, shown)
		}
	}
}

// leave waits for the command's end and returns its exit code.
func (p *typist) leave() int {
	p.t.Helper()
	done := make(chan error, 1)
	go func() { done <- p.cmd.Wait() }()
	select {
	case <-done:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(10 * time.Second):
		p.t.Fatal("the command does not end")
		return 0
	}
}

func modes(t *testing.T, f *os.File) unix.Termios {
	t.Helper()
	m, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *m
}

// A shell in a container on a terminal, as people use it: what it shows, its
// size and changes of it, the interrupt key, the exit code, and the terminal
// afterwards. Meanwhile others pull into the same store.
func TestTerminal(t *testing.T) {
	h := newHost(t)
	registry := testkit.Registry(t)
	name := registry.Push(t, testkit.Busybox(t), "busybox:latest")
	awkward := registry.Push(t, testkit.Awkward(t), "awkward:latest")
	h.run("pull", name)
	p := sit(t, h.command("run", "--rm", "-it", name, "sh"), 101, 33)
	before := modes(t, p.slave)
	p.await("# ")
	p.hit("echo $((20+22))\n")
	p.await("\r\n42\r\n")
	p.hit("tty\n")
	p.await("/dev/pts/0")
	p.hit("stty size\n")
	p.await("33 101")
	h.run("pull", awkward)
	p.hit("echo watching; until [ \"$(stty size)\" = '44 120' ]; do sleep 0.05; done; echo resized\n")
	p.await("\r\nwatching")
	p.resize(120, 44)
	p.await("\r\nresized")
	p.hit("sh -c 'echo asleep; exec sleep 100'\n")
	p.await("\r\nasleep") // said by who is interrupted, not by the shell that is about to start it
	p.hit("\x03")
	p.await("# ")
	p.hit("echo after $?\n")
	p.await("\r\nafter 130")
	p.hit("exit 7\n")
	if code := p.leave(); code != 7 {
		t.Errorf("exit code %d", code)
	}
	if after := modes(t, p.slave); after.Lflag != before.Lflag || after.Iflag != before.Iflag || after.Oflag != before.Oflag {
		t.Errorf("the terminal is left as %+v, it was %+v", after, before)
	}
}

// With --tty alone nothing of what is typed goes to the container, and the
// interrupt key ends it.
func TestTerminalWithoutInput(t *testing.T) {
	h := newHost(t)
	name := busybox(t)
	h.run("pull", name)
	p := sit(t, h.command("run", "--rm", "-t", name, "sh", "-c", "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.1; done"), 80, 24)
	p.await("ready")
	p.hit("\x03")
	p.await("caught")
	if code := p.leave(); code != 3 {
		t.Errorf("exit code %d", code)
	}
	if out, code := h.try("run", "--rm", "-t", name, "true"); code == 0 || !strings.Contains(out, "not a terminal") {
		t.Errorf("--tty without a terminal: exit code %d, %s", code, fmt.Sprintf("%.200s", out))
	}
}
