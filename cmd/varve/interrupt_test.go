package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"varve.dev/internal/testkit"
)

// begin starts varve and returns when its output has text in it.
func (h *host) begin(text string, args ...string) (*exec.Cmd, *testkit.Buffer) {
	h.t.Helper()
	cmd := h.command(args...)
	out := &testkit.Buffer{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = cmd.Process.Kill() })
	h.eventually(fmt.Sprintf("%q in the output of varve %s", text, strings.Join(args, " ")), func() bool {
		return strings.Contains(out.String(), text)
	})
	return cmd, out
}

func (h *host) eventually(what string, ok func() bool) {
	h.t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatalf("still not: %s", what)
		}
	}
}

// running counts the processes on this machine with an argument.
func running(t *testing.T, arg string) (n int) {
	t.Helper()
	list, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range list {
		data, _ := os.ReadFile(p) // it may have ended
		for a := range bytes.SplitSeq(data, []byte{0}) {
			if string(a) == arg {
				n++
			}
		}
	}
	return n
}

// marker is an argument for sleep that no other process has.
func marker() string { return fmt.Sprintf("9%d", time.Now().UnixNano()%1e9) }

// However a build ends, what it had started ends with it, the steps that were
// done stay done, and the store is clean.
func TestInterruptedBuild(t *testing.T) {
	for _, c := range []struct {
		name   string
		signal syscall.Signal
		code   int
	}{
		{"interrupt", syscall.SIGINT, 130},
		{"terminate", syscall.SIGTERM, 143},
		{"kill", syscall.SIGKILL, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			name, mark := busybox(t), marker()
			text := func(last string) string {
				return fmt.Sprintf("FROM %s\nRUN echo done > /done\nRUN echo begun && %s\n", name, last)
			}
			cmd, out := h.begin("begun\n", "build", "-t", "x", dockerfile(t, text("sleep "+mark)))
			if running(t, mark) == 0 {
				t.Fatal("the step does not run")
			}
			began := time.Now()
			if err := cmd.Process.Signal(c.signal); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != c.code {
				t.Errorf("exit code %d, want %d\n%s", code, c.code, out)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("it took %v to end", took)
			}
			h.eventually("the step's processes have ended", func() bool { return running(t, mark) == 0 })
			if out, code := h.try("run", "--pull", "never", "x", "true"); code == 0 {
				t.Errorf("the build that was cut off left an image\n%s", out)
			}
			if out := h.run("build", "-t", "x", dockerfile(t, text("true"))); !strings.Contains(out, "1 cached, 1 run") {
				t.Errorf("the build after it:\n%s", out)
			}
		})
	}
}

// Two builds want the same step; the one that runs it is interrupted. The
// other one runs it then, whether the store is open in its process or not.
func TestInterruptedBuildHandsOver(t *testing.T) {
	h := newHost(t)
	name, mark := busybox(t), marker()
	h.run("pull", name)
	dir := dockerfile(t, fmt.Sprintf("FROM %s\nRUN --mount=type=cache,target=/c echo begun; test -e /c/second || { touch /c/second; sleep %s; }; echo ended\n", name, mark))
	first, _ := h.begin("begun\n", "build", "-t", "first", dir)
	second := h.command("build", "-t", "second", dir)
	out := &testkit.Buffer{}
	second.Stdout, second.Stderr = out, out
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond) // it gets to where it waits for the first
	if err := first.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := second.Wait(); err != nil || !strings.Contains(out.String(), "ended") {
		t.Errorf("the second build: %v\n%s", err, out)
	}
	_ = first.Wait()
	h.run("run", "--rm", "second", "true")
}

// The process that has the store open is killed; those who used it through
// that process find another way.
func TestHostIsKilled(t *testing.T) {
	h := newHost(t)
	name, mark := busybox(t), marker()
	h.run("pull", name)
	host, _ := h.begin("begun\n", "build", dockerfile(t, fmt.Sprintf("FROM %s\nRUN echo begun; sleep %s\n", name, mark)))
	const guests = 3
	ends := make(chan string, guests)
	for i := range guests {
		guest, out := h.begin("guest begun\n", "build", "-t", fmt.Sprintf("guest%d", i),
			dockerfile(t, fmt.Sprintf("FROM %[1]s\nRUN --mount=type=cache,target=/c echo guest begun; test -e /c/%[2]d || { touch /c/%[2]d; sleep 60; }; echo %[2]d > /made\n", name, i)))
		go func() {
			err := guest.Wait()
			ends <- fmt.Sprintf("%v\n%s", err, out)
		}()
	}
	if err := host.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = host.Wait()
	for range guests {
		if end := <-ends; !strings.HasPrefix(end, "<nil>") || !strings.Contains(end, "once more") {
			t.Errorf("a guest ends with %s", end)
		}
	}
	for i := range guests {
		if out := h.run("run", "--rm", fmt.Sprintf("guest%d", i), "cat", "/made"); out != fmt.Sprintln(i) {
			t.Errorf("guest %d made %q", i, out)
		}
	}
	h.eventually("the killed build's step has ended", func() bool { return running(t, mark) == 0 })
}

// A pull that is interrupted goes on where it was.
func TestInterruptedPull(t *testing.T) {
	h := newHost(t)
	name := busybox(t)
	for range 3 {
		cmd := h.command("pull", name)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Millisecond)
		_ = cmd.Process.Signal(syscall.SIGINT)
		_ = cmd.Wait()
	}
	h.run("pull", name)
	h.run("run", "--rm", name, "true")
}
