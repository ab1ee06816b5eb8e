package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/overlay"
)

// ExitFile is the name in a container's directory of what holds an [Exit].
const ExitFile = "exit.json"

// Spec says what a container is to be.
type Spec struct {
	ID       string       `json:"id"`
	Name     string       `json:"name,omitempty"`
	Args     []string     `json:"args"`
	Env      []string     `json:"env,omitempty"`
	Cwd      string       `json:"cwd,omitempty"`  // absolute; empty: "/"
	User     string       `json:"user,omitempty"` // NAME|UID[:GROUP|GID], looked up in the container
	Hostname string       `json:"hostname,omitempty"`
	Rootfs   overlay.Tree `json:"rootfs"`
	ReadOnly bool         `json:"readOnly,omitempty"` // the root file system
	Mounts   []Mount      `json:"mounts,omitempty"`   // in order, after /proc, /dev and /sys
	Network  Network      `json:"network,omitempty"`  // empty: none
	Terminal bool         `json:"terminal,omitempty"` // give it a terminal of its own
	Stdin    bool         `json:"stdin,omitempty"`    // hand the shim's standard input on

	Privileged bool     `json:"privileged,omitempty"`
	CapAdd     []string `json:"capAdd,omitempty"` // "NET_ADMIN" or "CAP_NET_ADMIN", "ALL"
	CapDrop    []string `json:"capDrop,omitempty"`

	Memory    int64 `json:"memory,omitempty"`   // bytes, swap included; 0: no limit
	NanoCPUs  int64 `json:"nanoCPUs,omitempty"` // billionths of a processor; 0: no limit
	PidsLimit int64 `json:"pidsLimit,omitempty"`

	// Edits are added to what the container is made of: a device's mounts, nodes
	// and hooks, as the Container Device Interface has them.
	Edits *specs.Spec `json:"edits,omitempty"`

	ShmSize      int64    `json:"shmSize,omitempty"`      // bytes of /dev/shm; 0: 64 MiB
	Rlimits      []Rlimit `json:"rlimits,omitempty"`      // others are the shim's own
	CgroupParent string   `json:"cgroupParent,omitempty"` // empty: /varve
	// What a processor's time is shared by, and which of them may be used.
	CPUShares  uint64 `json:"cpuShares,omitempty"`
	CPUPeriod  uint64 `json:"cpuPeriod,omitempty"` // microseconds
	CPUQuota   int64  `json:"cpuQuota,omitempty"`  // microseconds in a period
	CPUSetCPUs string `json:"cpusetCPUs,omitempty"`
	CPUSetMems string `json:"cpusetMems,omitempty"`
	// MemorySwap limits memory and swap together; -1: swap without limit.
	MemorySwap int64 `json:"memorySwap,omitempty"`
}

// Rlimit is a limit of the kernel for each process, as getrlimit(2) has it.
type Rlimit struct {
	Name string `json:"name"` // "nofile", without RLIMIT_
	Soft uint64 `json:"soft"`
	Hard uint64 `json:"hard"`
}

// Secret is a file that is in memory alone.
type Secret struct {
	Data []byte `json:"data"`
	UID  int    `json:"uid"`
	GID  int    `json:"gid"`
	Mode uint32 `json:"mode"` // permissions
}

// Mount puts something into the container.
type Mount struct {
	Type string `json:"type"` // "bind", "tmpfs", "overlay" or "secret"
	// Source is the path to bind, on the host; of an overlay, the path in it.
	Source   string        `json:"source,omitempty"`
	Overlay  *overlay.Tree `json:"overlay,omitempty"`
	Target   string        `json:"target"` // absolute in the container
	ReadOnly bool          `json:"readOnly,omitempty"`
	Options  []string      `json:"options,omitempty"`
	Secret   *Secret       `json:"secret,omitempty"`
}

// Network is what a container sees of the network.
type Network string

// The networks.
const (
	HostNetwork Network = "host"
	NoNetwork   Network = "none" // a loopback interface of its own
)

// Validate refuses what no container can be. Errors: ErrInvalidArgument.
func (s *Spec) Validate() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("container %s: "+format+": %w", append(append([]any{s.ID}, args...), errdefs.ErrInvalidArgument)...)
	}
	switch {
	case s.ID == "":
		return bad("has no id")
	case len(s.Args) == 0:
		return bad("has no command")
	case s.Cwd != "" && !filepath.IsAbs(s.Cwd):
		return bad("working directory %q is not absolute", s.Cwd)
	case s.Network != "" && s.Network != HostNetwork && s.Network != NoNetwork:
		return bad("network %q is not host or none", s.Network)
	case len(s.Rootfs.Lowers) == 0 && s.Rootfs.Upper == "":
		return bad("has no root file system")
	case s.Memory < 0 || s.NanoCPUs < 0 || s.PidsLimit < 0:
		return bad("has a negative limit")
	}
	for _, m := range s.Mounts {
		if m.Type != "bind" && m.Type != "tmpfs" && (m.Type != "overlay" || m.Overlay == nil) && (m.Type != "secret" || m.Secret == nil) {
			return bad("mount type %q is not bind, tmpfs, overlay or secret with its parts", m.Type)
		}
		if !filepath.IsAbs(m.Target) || filepath.Clean(m.Target) == "/" {
			return bad("mount target %q is not an absolute path below the root", m.Target)
		}
		if m.Type == "bind" && !filepath.IsAbs(m.Source) {
			return bad("mount source %q is not absolute", m.Source)
		}
	}
	return nil
}

// Encode returns the spec as it stands in the container's directory. Errors:
// ErrInvalidArgument, also for one with secrets, which no disk is to have.
func (s *Spec) Encode() ([]byte, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	for _, m := range s.Mounts {
		if m.Secret != nil {
			return nil, fmt.Errorf("container %s: a secret cannot be kept: %w", s.ID, errdefs.ErrInvalidArgument)
		}
	}
	return encode(s.ID, s)
}

// Save writes the spec, durably, into the container's directory.
func (s *Spec) Save(dir string) error {
	if _, err := s.Encode(); err != nil {
		return err
	}
	return save(dir, layout.ContainerConfig, s)
}

// Load reads the spec of the container in dir.
func Load(dir string) (*Spec, error) {
	var s Spec
	if err := load(dir, layout.ContainerConfig, &s); err != nil {
		return nil, err
	}
	return &s, s.Validate()
}

// ReadSpec reads the spec of a step, which is in no directory.
func ReadSpec(r io.Reader) (*Spec, error) {
	var s Spec
	if err := json.NewDecoder(r).Decode(&s); err != nil {
		return nil, fmt.Errorf("step: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return &s, s.Validate()
}

// Exit is what became of a container.
type Exit struct {
	Code      int       `json:"code"`             // as a shell has it: 128 and the signal's number for a kill
	Signal    int       `json:"signal,omitempty"` // that ended it
	OOMKilled bool      `json:"oomKilled,omitempty"`
	Started   time.Time `json:"started"`
	Finished  time.Time `json:"finished"`
	Error     string    `json:"error,omitempty"` // why it could not be started
}

// Exit codes for what did not start, as docker has them.
const (
	CodeRuntime       = 125
	CodeNotExecutable = 126
	CodeNotFound      = 127
)

// Save writes the record, durably, into the container's directory.
func (e *Exit) Save(dir string) error { return save(dir, ExitFile, e) }

// ReadExit reads what became of the container in dir. Errors: ErrNotFound
// while it runs, and if its shim was killed.
func ReadExit(dir string) (Exit, error) {
	var e Exit
	err := load(dir, ExitFile, &e)
	return e, err
}

func encode(container string, v any) ([]byte, error) {
	data, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return nil, fmt.Errorf("container %s: %w: %w", container, err, errdefs.ErrInternal)
	}
	return data, nil
}

func save(dir, name string, v any) error {
	data, err := encode(dir, v)
	if err != nil {
		return err
	}
	root, err := durable.Open(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return root.WriteFile(name, data, 0o600)
}

func load(dir, name string, v any) error {
	data, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("container %s: no %s: %w", dir, name, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("container %s: %w: %w", dir, err, errdefs.ErrUnavailable)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("container %s: %s: %w: %w", dir, name, err, errdefs.ErrDataLoss)
	}
	return nil
}
