package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/moby/profiles/seccomp"
	"github.com/moby/sys/user"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"varve.dev/runtime"
)

// defaultPath is what a container's PATH is if nobody says another.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// defaultCaps are docker's (moby, daemon/pkg/oci/caps/defaults.go).
var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// masked and readonly are the paths that docker hides and protects (moby,
// daemon/pkg/oci/defaults.go).
var (
	masked = []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
		"/sys/devices/virtual/powercap",
	}
	readonly = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// configure makes libcontainer's terms of a spec.
func configure(rootfs string, s *runtime.Spec) (*configs.Config, *libcontainer.Process, error) {
	who, err := lookupUser(rootfs, s.User)
	if err != nil {
		return nil, nil, err
	}
	caps, err := capabilities(s)
	if err != nil {
		return nil, nil, err
	}
	oci := ociSpec(rootfs, s, caps)
	if !s.Privileged {
		oci.Linux.MaskedPaths, oci.Linux.ReadonlyPaths = masked, readonly
		if oci.Linux.Seccomp, err = profile(oci); err != nil {
			return nil, nil, err
		}
	}
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: s.ID, Spec: oci})
	if err != nil {
		return nil, nil, fmt.Errorf("configure: %w", err)
	}
	env := append([]string{}, s.Env...)
	if !hasName(env, "PATH") {
		env = append(env, defaultPath)
	}
	if !hasName(env, "HOME") {
		env = append(env, "HOME="+who.Home)
	}
	if s.Terminal && !hasName(env, "TERM") {
		env = append(env, "TERM=xterm")
	}
	limits, err := rlimits(s)
	if err != nil {
		return nil, nil, err
	}
	process := &libcontainer.Process{
		Rlimits: limits,
		Args:    s.Args, Env: env, Cwd: cwd(s), Init: true,
		UID: who.Uid, GID: who.Gid, AdditionalGroups: groups(who),
	}
	return config, process, makeCwd(rootfs, s)
}

// groups are the process's supplementary groups, its own group among them: a
// program that drops its own group must not lose what that group denies
// (CVE-2022-36109).
func groups(who *user.ExecUser) []int {
	if slices.Contains(who.Sgids, who.Gid) {
		return who.Sgids
	}
	return append([]int{who.Gid}, who.Sgids...)
}

// profile is docker's default seccomp profile without the x32 ABI, which
// distributions' kernels do not have: libseccomp takes half of its time for it
// (docs/design/0003-container-start.md).
func profile(oci *specs.Spec) (*specs.LinuxSeccomp, error) {
	p, err := seccomp.GetDefaultProfile(oci)
	if err != nil {
		return nil, fmt.Errorf("seccomp: %w", err)
	}
	p.Architectures = slices.DeleteFunc(p.Architectures, func(a specs.Arch) bool { return a == specs.ArchX32 })
	return p, nil
}

func hasName(env []string, name string) bool {
	return slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, name+"=") })
}

func cwd(s *runtime.Spec) string {
	if s.Cwd == "" {
		return "/"
	}
	return s.Cwd
}

// makeCwd makes the working directory if the image lacks it, as docker does.
func makeCwd(rootfs string, s *runtime.Spec) error {
	rel := strings.Trim(cwd(s), "/")
	if rel == "" || s.Rootfs.Upper == "" {
		return nil
	}
	for _, m := range s.Mounts {
		if strings.HasPrefix(cwd(s)+"/", m.Target+"/") {
			return nil
		}
	}
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return err
	}
	defer root.Close()
	if _, err := root.Stat(rel); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return nil // there, or a matter for the container's own start
	}
	return root.MkdirAll(rel, 0o755)
}

// lookupUser finds a user and its groups in the container's own files.
func lookupUser(rootfs, spec string) (*user.ExecUser, error) {
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	// Closed at once: a shim that held files of the image would keep its
	// container from ever seeing them repaired.
	read := func(name string) io.Reader {
		f, err := root.Open(name)
		if err != nil {
			return strings.NewReader("")
		}
		defer f.Close()
		data, err := io.ReadAll(io.LimitReader(f, maxUserFile))
		if err != nil {
			return strings.NewReader("")
		}
		return bytes.NewReader(data)
	}
	who, err := user.GetExecUser(spec, &user.ExecUser{Home: "/"}, read("etc/passwd"), read("etc/group"))
	if err != nil {
		return nil, fmt.Errorf("user %q: %w", spec, err)
	}
	return who, nil
}

// maxUserFile is more than anybody's /etc/passwd, in bytes.
const maxUserFile = 16 << 20

// ociSpec is the runtime-spec form of a container.
func ociSpec(rootfs string, s *runtime.Spec, caps []string) *specs.Spec {
	sets := &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	oci := &specs.Spec{
		Version:  specs.Version,
		Root:     &specs.Root{Path: rootfs, Readonly: s.ReadOnly || s.Rootfs.Upper == ""},
		Hostname: s.Hostname,
		Process:  &specs.Process{Args: s.Args, Cwd: cwd(s), Terminal: s.Terminal, Capabilities: sets},
		Mounts:   mounts(s),
		Linux: &specs.Linux{
			CgroupsPath: path.Join("/", cmp.Or(s.CgroupParent, "varve"), s.ID),
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
			},
			Resources: resources(s),
		},
	}
	if s.Network != runtime.HostNetwork {
		oci.Linux.Namespaces = append(oci.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
	}
	if cgroups.IsCgroup2UnifiedMode() {
		oci.Linux.Namespaces = append(oci.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	if e := s.Edits; e != nil {
		oci.Mounts, oci.Hooks = append(oci.Mounts, e.Mounts...), e.Hooks
		if e.Linux != nil {
			oci.Linux.Devices = append(oci.Linux.Devices, e.Linux.Devices...)
			if e.Linux.Resources != nil {
				oci.Linux.Resources.Devices = append(oci.Linux.Resources.Devices, e.Linux.Resources.Devices...)
			}
		}
	}
	return oci
}

func mounts(s *runtime.Spec) []specs.Mount {
	readOnly := "ro"
	if s.Privileged {
		readOnly = "rw"
	}
	all := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", readOnly}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{readOnly, "nosuid", "noexec", "nodev"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", fmt.Sprintf("size=%d", cmp.Or(s.ShmSize, defaultShm))}},
	}
	if s.Network == runtime.HostNetwork {
		// A sysfs of its own would show another network than the one that
		// the container is in.
		all[3] = specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys", Options: []string{"rbind", "nosuid", "noexec", "nodev", readOnly}}
		all = slices.Delete(all, 4, 5)
	}
	for _, m := range s.Mounts {
		options := append([]string{}, m.Options...)
		if m.Type == "bind" {
			options = append(options, "rbind")
		}
		if m.ReadOnly {
			options = append(options, "ro")
		}
		all = append(all, specs.Mount{Destination: m.Target, Type: m.Type, Source: m.Source, Options: options})
	}
	return all
}

// defaultShm is the size of /dev/shm, in bytes, as docker has it.
const defaultShm = 64 << 20

// limitNumbers are those of getrlimit(2) by docker's names.
var limitNumbers = map[string]int{
	"as": unix.RLIMIT_AS, "core": unix.RLIMIT_CORE, "cpu": unix.RLIMIT_CPU, "data": unix.RLIMIT_DATA, "fsize": unix.RLIMIT_FSIZE,
	"locks": unix.RLIMIT_LOCKS, "memlock": unix.RLIMIT_MEMLOCK, "msgqueue": unix.RLIMIT_MSGQUEUE, "nice": unix.RLIMIT_NICE,
	"nofile": unix.RLIMIT_NOFILE, "nproc": unix.RLIMIT_NPROC, "rss": unix.RLIMIT_RSS, "rtprio": unix.RLIMIT_RTPRIO,
	"rttime": unix.RLIMIT_RTTIME, "sigpending": unix.RLIMIT_SIGPENDING, "stack": unix.RLIMIT_STACK,
}

// rlimits are kept within what this process has itself, if it may not raise it.
func rlimits(s *runtime.Spec) (out []configs.Rlimit, err error) {
	for _, l := range s.Rlimits {
		number, ok := limitNumbers[strings.ToLower(l.Name)]
		if !ok {
			return nil, fmt.Errorf("limit %q is unknown", l.Name)
		}
		var have unix.Rlimit
		if err := unix.Getrlimit(number, &have); err == nil && l.Hard > have.Max && unix.Setrlimit(number, &unix.Rlimit{Cur: have.Cur, Max: l.Hard}) != nil {
			fmt.Fprintf(os.Stderr, "varve-runtime: limit %s of %d is more than this host allows, which is %d\n", l.Name, l.Hard, have.Max)
			l.Soft, l.Hard = min(l.Soft, have.Max), have.Max
		}
		out = append(out, configs.Rlimit{Type: number, Soft: l.Soft, Hard: l.Hard})
	}
	return out, nil
}

// cpuPeriod is the kernel's default scheduling period in microseconds.
const cpuPeriod = 100_000

func resources(s *runtime.Spec) *specs.LinuxResources {
	r := &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: s.Privileged, Access: "rwm"}}}
	if s.Memory > 0 {
		r.Memory = &specs.LinuxMemory{Limit: &s.Memory}
		if s.MemorySwap == 0 && swapAccounted() {
			r.Memory.Swap = &s.Memory
		}
	}
	if s.NanoCPUs > 0 {
		period := uint64(cpuPeriod)
		quota := s.NanoCPUs * cpuPeriod / 1e9
		r.CPU = &specs.LinuxCPU{Period: &period, Quota: &quota}
	}
	if s.MemorySwap != 0 && swapAccounted() {
		if r.Memory == nil {
			r.Memory = &specs.LinuxMemory{}
		}
		r.Memory.Swap = &s.MemorySwap
	}
	if s.CPUShares > 0 || s.CPUPeriod > 0 || s.CPUQuota != 0 || s.CPUSetCPUs != "" || s.CPUSetMems != "" {
		if r.CPU == nil {
			r.CPU = &specs.LinuxCPU{}
		}
		r.CPU.Cpus, r.CPU.Mems = s.CPUSetCPUs, s.CPUSetMems
		if s.CPUShares > 0 {
			r.CPU.Shares = &s.CPUShares
		}
		if s.CPUPeriod > 0 {
			r.CPU.Period = &s.CPUPeriod
		}
		if s.CPUQuota != 0 {
			r.CPU.Quota = &s.CPUQuota
		}
	}
	if s.PidsLimit > 0 {
		r.Pids = &specs.LinuxPids{Limit: &s.PidsLimit}
	}
	return r
}

// swapAccounted tells whether the kernel can limit memory and swap together.
func swapAccounted() bool {
	if cgroups.IsCgroup2UnifiedMode() {
		return true
	}
	_, err := os.Stat("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
	return err == nil
}

// capabilities applies what is added and dropped to docker's set, within what
// this process has itself.
func capabilities(s *runtime.Spec) ([]string, error) {
	known := knownCaps()
	set := defaultCaps
	if s.Privileged {
		set = known
	}
	parse := func(list []string) (names []string, err error) {
		for _, c := range list {
			c = strings.ToUpper(c)
			if c == "ALL" {
				names = append(names, known...)
				continue
			}
			if !strings.HasPrefix(c, "CAP_") {
				c = "CAP_" + c
			}
			if !slices.Contains(known, c) {
				return nil, fmt.Errorf("capability %q is unknown or not to be had here", c)
			}
			names = append(names, c)
		}
		return names, nil
	}
	add, err := parse(s.CapAdd)
	if err != nil {
		return nil, err
	}
	drop, err := parse(s.CapDrop)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, c := range known {
		if slices.Contains(add, c) || slices.Contains(set, c) && !slices.Contains(drop, c) {
			out = append(out, c)
		}
	}
	return out, nil
}

// knownCaps are the capabilities in this process's bounding set: no container
// can have more.
func knownCaps() []string {
	var out []string
	for number, name := range capNames {
		if v, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(number), 0, 0, 0); err == nil && v == 1 {
			out = append(out, name)
		}
	}
	return out
}

// capNames are in the order of their numbers (capability.h).
var capNames = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
	"CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
	"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
	"CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}
