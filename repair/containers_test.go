package repair_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/internal/testbuild"
	"varve.dev/internal/testkit"
)

// running is a container with a shell that does what it is told.
type running struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func (h *host) start(t *testing.T, name string) *running {
	t.Helper()
	var c varve.Container
	h.with(t, func(ctx context.Context, e *daemon.Engine) {
		var err error
		c, err = e.Create(ctx, varve.CreateRequest{Image: h.remote + "/busybox:1", Name: name, Command: []string{"sh"}, Stdin: true}, nil)
		if err != nil {
			t.Fatal(err)
		}
	})
	r := &running{cmd: exec.Command(os.Getenv("VARVE_RUNTIME"), "run", c.Dir)}
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	in, err1 := r.cmd.StdinPipe()
	out, err2 := r.cmd.StdoutPipe()
	r.cmd.Stderr = os.Stderr
	if err := errors.Join(err1, err2, r.cmd.Start()); err != nil {
		t.Fatal(err)
	}
	r.in, r.out = in, bufio.NewReader(out)
	t.Cleanup(func() {
		in.Close()
		_ = r.cmd.Wait()
	})
	return r
}

// ask has the shell run a command that prints one line.
func (r *running) ask(t *testing.T, command string) string {
	t.Helper()
	if _, err := fmt.Fprintln(r.in, command); err != nil {
		t.Fatal(err)
	}
	line, err := r.out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// A file is damaged in the base of three images, under containers that run: they
// go on, see the good file where they do not hold the bad one, and are named.
// Nothing is fetched while the layer's blob is there, and that blob if not.
func TestRunningContainer(t *testing.T) {
	h := newHost(t)
	h.with(t, func(ctx context.Context, e *daemon.Engine) {
		for _, name := range []string{"second:1", "third:1"} {
			_, err := testbuild.Run(ctx, e, testbuild.Build{
				Name: name, Dockerfile: "FROM " + h.remote + "/busybox:1\nRUN echo " + name + " >/name\n", Network: "none",
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	})
	h.trees = h.hash(t)
	reader, holder := h.start(t, "reader"), h.start(t, "holder")
	file := h.find(t, "etc/passwd")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := flip(file); err != nil {
		t.Fatal(err)
	}
	sum := "cat /etc/passwd | md5sum"
	bad := reader.ask(t, sum)
	pid := reader.ask(t, "echo $PPID $$")
	holder.ask(t, "exec 7</etc/passwd; echo opened")

	r := h.repair(t)
	h.whole(t, r)
	s := stepOf(t, r, "layer")
	if s.Done.Fetched != 0 || len(s.Done.Containers) != 2 {
		t.Errorf("%+v\n%s", s.Done, r.Text)
	}
	for _, c := range s.Done.Containers {
		if (c.Name == "holder") != (len(c.PIDs) > 0) {
			t.Errorf("container %s: processes %v", c.Name, c.PIDs)
		}
	}
	if now := reader.ask(t, sum); now == bad {
		t.Error("the container still sees what was bad")
	}
	if now := reader.ask(t, "echo $PPID $$"); now != pid {
		t.Errorf("the container's processes were %s, and are %s", pid, now)
	}
	if got := holder.ask(t, "md5sum <&7"); got != bad {
		t.Errorf("a descriptor that was open reads something else: %s, %s", got, bad)
	}
	if now, err := os.ReadFile(file); err != nil || string(now) != string(good) {
		t.Errorf("the file: %v", err)
	}

	m, _ := testkit.ReadImage(t, testkit.Busybox(t))
	if err := errors.Join(flip(file), os.Remove(h.blob(m.Layers[0].Digest.String()))); err != nil {
		t.Fatal(err)
	}
	r = h.repair(t)
	h.whole(t, r)
	if fetched := stepOf(t, r, "blob").Done.Fetched + stepOf(t, r, "layer").Done.Fetched; fetched != m.Layers[0].Size {
		t.Errorf("%d bytes fetched, the layer has %d:\n%s", fetched, m.Layers[0].Size, r.Text)
	}
	if now := reader.ask(t, "echo $PPID $$"); now != pid {
		t.Errorf("the container's processes were %s, and are %s", pid, now)
	}
}
