package runtime_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"varve.dev/internal/testkit"
	"varve.dev/overlay"
	"varve.dev/runtime"
)

func TestMain(m *testing.M) {
	code := m.Run()
	testkit.RemoveBinaries()
	os.Exit(code)
}

// shim returns the path of the shim.
func shim(t *testing.T) string {
	t.Helper()
	return filepath.Join(testkit.Binaries(t), "varve-runtime")
}

// box is a root file system of busybox with a writable layer on it.
func box(t *testing.T) runtime.Spec {
	t.Helper()
	testkit.NeedRoot(t)
	dir := t.TempDir()
	lower := filepath.Join(dir, "lower")
	for _, d := range []string{"lower/bin", "lower/etc", "lower/tmp", "upper", "work"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("busybox-static is not installed: %v", err)
	}
	files := map[string]string{
		"bin/busybox": string(data),
		"etc/passwd":  "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n",
		"etc/group":   "root:x:0:\nalice:x:1000:\nextra:x:2000:alice\n",
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(lower, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, applet := range []string{"sh", "id", "env", "sleep", "cat", "ls", "dd", "touch", "mkdir", "unshare", "hostname", "kill", "true", "ip"} {
		if err := os.Symlink("busybox", filepath.Join(lower, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	id := fmt.Sprintf("test-%d-%d", os.Getpid(), time.Now().UnixNano())
	t.Cleanup(func() { noLeftovers(t, id, dir) })
	return runtime.Spec{ID: id, Rootfs: overlay.Tree{
		Lowers: []string{lower}, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work"),
	}}
}

// noLeftovers is every test's end: no mount, cgroup or process stays.
func noLeftovers(t *testing.T, id, dir string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), dir) {
		t.Errorf("a mount below %s stays", dir)
	}
	found, err := filepath.Glob("/sys/fs/cgroup/*/varve/" + id)
	if err != nil || len(found) > 0 {
		t.Errorf("cgroups stay: %v %v", found, err)
	}
}

func run(t *testing.T, spec runtime.Spec, args ...string) (runtime.Exit, string) {
	t.Helper()
	path := shim(t)
	spec.Args = args
	var out bytes.Buffer
	x := runtime.Executor{Shim: path, Dir: t.TempDir()}
	exit, err := x.Run(t.Context(), spec, runtime.Streams{Out: &out, Err: &out})
	if err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	return exit, out.String()
}

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"true"}, 0},
		{[]string{"sh", "-c", "exit 37"}, 37},
		{[]string{"sh", "-c", "kill -9 $$; sleep 5"}, 0}, // signals to a namespace's first process from within are dropped
		{[]string{"no-such-program"}, runtime.CodeNotFound},
		{[]string{"/etc"}, runtime.CodeNotExecutable},
	} {
		spec := box(t)
		if c.args[0] == "sh" && strings.HasPrefix(c.args[2], "kill") {
			c.args[2] = "sh -c 'kill -9 $$'; exit $?"
			c.code = 137
		}
		exit, out := run(t, spec, c.args...)
		if exit.Code != c.code {
			t.Errorf("%q: exit code %d, want %d (%s%s)", c.args, exit.Code, c.code, out, exit.Error)
		}
	}
}

func TestWhatTheContainerSees(t *testing.T) {
	spec := box(t)
	spec.Env = []string{"COLOUR=grey"}
	spec.User = "alice"
	spec.Cwd = "/made/for/it"
	spec.Hostname = "varved"
	_, out := run(t, spec, "sh", "-c", "id; pwd; hostname; echo $COLOUR $HOME; ls -d /proc/1; cat /proc/1/comm")
	for _, want := range []string{"uid=1000(alice)", "2000(extra)", "/made/for/it", "varved", "grey /home/alice", "/proc/1"} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
}

func TestDefaultConfinement(t *testing.T) {
	_, out := run(t, box(t), "sh", "-c", `cat /proc/self/status; ls -l /proc/kcore; cat /proc/keys | busybox wc -c; echo x > /proc/sys/kernel/hostname || echo proc-sys-protected; unshare -m true || echo unshare-refused`)
	for _, want := range []string{"CapEff:\t00000000a80425fb", "Seccomp:\t2", "proc-sys-protected", "unshare-refused"} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
}

func TestMounts(t *testing.T) {
	spec := box(t)
	host := t.TempDir()
	if err := os.WriteFile(filepath.Join(host, "file"), []byte("from the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	spec.Mounts = []runtime.Mount{
		{Type: "bind", Source: host, Target: "/ro", ReadOnly: true},
		{Type: "bind", Source: host, Target: "/rw"},
		{Type: "tmpfs", Target: "/scratch", Options: []string{"size=1m"}},
	}
	_, out := run(t, spec, "sh", "-c", "cat /ro/file; touch /ro/new || echo protected; touch /rw/new; touch /scratch/x /kept")
	if !strings.Contains(out, "from the host") || !strings.Contains(out, "protected") {
		t.Errorf("output:\n%s", out)
	}
	if _, err := os.Stat(filepath.Join(host, "new")); err != nil {
		t.Error(err)
	}
	// What was only made to be mounted on is no part of the layer.
	entries, err := os.ReadDir(spec.Rootfs.Upper)
	if err != nil || len(entries) != 1 || entries[0].Name() != "kept" {
		t.Errorf("upper directory holds %v (%v), want only \"kept\"", entries, err)
	}
}

func TestNetworkNone(t *testing.T) {
	spec := box(t)
	spec.Network = runtime.NoNetwork
	_, out := run(t, spec, "sh", "-c", "ip link")
	if !strings.Contains(out, "lo") || strings.Contains(out, "eth") {
		t.Errorf("interfaces:\n%s", out)
	}
}

func TestMemoryLimitKills(t *testing.T) {
	spec := box(t)
	spec.Memory = 16 << 20
	exit, out := run(t, spec, "sh", "-c", "dd if=/dev/zero of=/dev/null bs=64M count=1")
	if exit.Code == 0 {
		t.Errorf("64 MiB were had under a limit of 16: %s", out)
	}
	if !exit.OOMKilled {
		t.Errorf("record does not say that the limit killed: %+v", exit)
	}
}

func TestPidsLimit(t *testing.T) {
	spec := box(t)
	spec.PidsLimit = 4
	_, out := run(t, spec, "sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 2 & done; wait")
	if !strings.Contains(out, "can't fork") {
		t.Errorf("nine processes under a limit of four:\n%s", out)
	}
}

func TestManyLayers(t *testing.T) {
	for _, n := range []int{200, 500} {
		spec := box(t)
		base := t.TempDir()
		for i := len(spec.Rootfs.Lowers); i < n; i++ {
			dir := filepath.Join(base, fmt.Sprintf("layer-%03d", i))
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			spec.Rootfs.Lowers = append([]string{dir}, spec.Rootfs.Lowers...)
		}
		if err := os.WriteFile(filepath.Join(spec.Rootfs.Lowers[0], "top"), []byte("top\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, out := run(t, spec, "cat", "/top"); out != "top\n" {
			t.Errorf("%d layers: %q", n, out)
		}
	}
}

func TestCancelLeavesNothing(t *testing.T) {
	spec := box(t)
	path := shim(t)
	spec.Args = []string{"sh", "-c", "sleep 1000 & sleep 1000 & sleep 1000"}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	begin := time.Now()
	x := runtime.Executor{Shim: path, Dir: t.TempDir()}
	if _, err := x.Run(ctx, spec, runtime.Streams{Out: os.Stdout, Err: os.Stderr}); err == nil {
		t.Error("a cancelled step ended well")
	}
	if d := time.Since(begin); d > 10*time.Second {
		t.Errorf("cancelling took %v", d)
	}
}
