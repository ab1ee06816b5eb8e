// Command start times the bare start of a container, from nothing to the exit
// of /bin/true: varve's shim, as a build step uses it, beside crun and runc
// with the same namespaces, mounts, capabilities, masks and seccomp profile,
// and beside itself with one thing left out.
//
//	go run ./benchmarks/start [-n PAIRS] [-shim bin/varve-runtime] [-beside ANOTHER]
//
// -beside takes another build of the shim, to see what a change is worth.
// It wants root, busybox-static, and crun or runc for the comparison.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"varve.dev/overlay"
	"varve.dev/runtime"
)

func main() {
	pairs := flag.Int("n", 40, "pairs of starts")
	shim := flag.String("shim", "bin/varve-runtime", "path of the shim")
	beside := flag.String("beside", "", "path of another build of the shim")
	flag.Parse()
	if err := inOwnMounts(); err != nil {
		fail(err)
	}
	path, err := filepath.Abs(*shim)
	if err == nil {
		err = run(path, *beside, *pairs)
	}
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "start:", err)
	os.Exit(1)
}

// inOwnMounts runs this program again in a mount namespace without the empty
// cgroup v2 hierarchy beside v1, which crun takes for a reason to refuse.
func inOwnMounts() error {
	const again = "VARVE_BENCH_MOUNTS"
	if os.Getenv(again) != "" {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		_ = unix.Unmount("/sys/fs/cgroup/unified", unix.MNT_DETACH)
		return nil
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), again+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err == nil {
		os.Exit(0)
	}
	return err
}

// contender is one way to start /bin/true.
type contender struct {
	name  string
	start func() error
	times []time.Duration
}

func run(shim, beside string, pairs int) error {
	dir, err := os.MkdirTemp("", "varve-start-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	rootfs := filepath.Join(dir, "rootfs")
	if err := makeRootfs(rootfs); err != nil {
		return err
	}
	contenders, err := contend(dir, rootfs, shim, beside)
	if err != nil {
		return err
	}
	for round := range pairs + 1 {
		for i := range contenders {
			begin := time.Now()
			if err := contenders[i].start(); err != nil {
				return fmt.Errorf("%s: %w", contenders[i].name, err)
			}
			if round > 0 { // the first warms up
				contenders[i].times = append(contenders[i].times, time.Since(begin))
			}
		}
	}
	fmt.Printf("%-48s %10s %8s\n", "start to exit of /bin/true", "median", "of varve")
	base := median(contenders[0].times)
	for _, c := range contenders {
		m := median(c.times)
		fmt.Printf("%-48s %7.1f ms %8.2f\n", c.name, float64(m.Microseconds())/1000, float64(m)/float64(base))
	}
	return nil
}

func median(times []time.Duration) time.Duration {
	times = slices.Clone(times)
	slices.Sort(times)
	return times[len(times)/2]
}

// makeRootfs puts busybox into dir.
func makeRootfs(dir string) error {
	for _, d := range []string{"bin", "dev", "etc", "proc", "sys", "tmp"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	data, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("busybox-static: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), data, 0o755); err != nil {
		return err
	}
	return os.Symlink("busybox", filepath.Join(dir, "bin/true"))
}

func contend(dir, rootfs, shim, beside string) ([]contender, error) {
	full := runtime.Spec{Args: []string{"/bin/true"}, Network: runtime.NoNetwork, PidsLimit: 100}
	host, privileged := full, full
	host.Network = runtime.HostNetwork
	privileged.Privileged = true
	out := []contender{
		{name: "varve-runtime, a build step", start: step(dir, rootfs, shim, full)},
		{name: "  without a network namespace", start: step(dir, rootfs, shim, host)},
		{name: "  without seccomp, masks and rules for devices", start: step(dir, rootfs, shim, privileged)},
		{name: "  the shim's binary alone, refusing", start: alone(shim)},
	}
	if beside != "" {
		out = append(out, contender{name: beside, start: step(dir, rootfs, beside, full)})
	}
	for _, name := range []string{"crun", "runc"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		version, err := exec.Command(path, "--version").Output()
		if err != nil {
			return nil, err
		}
		start, err := ociRuntime(dir, rootfs, path)
		if err != nil {
			return nil, err
		}
		first, _, _ := strings.Cut(string(version), "\n")
		out = append(out, contender{name: first, start: start})
	}
	return out, nil
}

var number int

func step(dir, rootfs, shim string, spec runtime.Spec) func() error {
	x := runtime.Executor{Shim: shim, Dir: dir}
	return func() error {
		number++
		spec.ID = fmt.Sprintf("start%d", number)
		spec.Rootfs = overlay.Tree{Lowers: []string{rootfs}}
		exit, err := x.Run(context.Background(), spec, runtime.Streams{Out: io.Discard, Err: os.Stderr})
		if err == nil && exit.Code != 0 {
			err = fmt.Errorf("exit code %d: %s", exit.Code, exit.Error)
		}
		return err
	}
}

// alone is what a process of the shim's binary costs: Go's start, and the
// packages' initialisation.
func alone(shim string) func() error {
	return func() error {
		_ = exec.Command(shim).Run() // prints its usage, which is an error
		return nil
	}
}

func ociRuntime(dir, rootfs, path string) (func() error, error) {
	bundle := filepath.Join(dir, filepath.Base(path))
	if err := os.MkdirAll(bundle, 0o755); err != nil {
		return nil, err
	}
	spec, err := ociSpec(rootfs)
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o644); err != nil {
		return nil, err
	}
	state := filepath.Join(dir, "state")
	return func() error {
		number++
		cmd := exec.Command(path, "--root", state, "run", "--bundle", bundle, fmt.Sprintf("start%d", number))
		cmd.Stderr = os.Stderr
		return cmd.Run()
	}, nil
}

// ociSpec is what varve's shim makes of the spec above.
func ociSpec(rootfs string) (*specs.Spec, error) {
	caps := []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
		"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
	}
	pids := int64(100)
	spec := &specs.Spec{
		Version: "1.0.2", // what crun 1.8 knows
		Root:    &specs.Root{Path: rootfs, Readonly: true},
		Process: &specs.Process{
			Args: []string{"/bin/true"}, Cwd: "/", Env: []string{"PATH=/bin"}, NoNewPrivileges: false,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=67108864"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/varve/start",
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace}, {Type: specs.NetworkNamespace},
			},
			Resources: &specs.LinuxResources{
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
				Pids:    &specs.LinuxPids{Limit: &pids},
			},
			MaskedPaths: []string{
				"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
				"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
			},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
	profile, err := seccomp.GetDefaultProfile(spec)
	spec.Linux.Seccomp = profile
	return spec, err
}
