package powercut

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// FileSystem is a kind that a rig can make.
type FileSystem string

// The file systems.
const (
	Ext4  FileSystem = "ext4"
	XFS   FileSystem = "xfs"
	Btrfs FileSystem = "btrfs"
)

// FileSystems are all of them.
func FileSystems() []FileSystem { return []FileSystem{Ext4, XFS, Btrfs} }

// make is the command that formats a device, without its name.
func (fs FileSystem) make() []string {
	switch fs {
	case Ext4:
		return []string{"mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"}
	case XFS:
		return []string{"mkfs.xfs", "-q", "-K"}
	case Btrfs:
		return []string{"mkfs.btrfs", "-q", "-K"}
	}
	return nil
}

// options are for mount(2). Those of the kind are what Debian has without any
// but for discard, which this disk does not record as such; atimes would make
// readers write.
func (fs FileSystem) options() string {
	switch fs {
	case Btrfs:
		return "nodiscard"
	case XFS:
		return "nouuid" // images of one disk are mounted at once
	}
	return ""
}

// Rig serves disks and mounts file systems on them. Its methods may be called
// at once.
type Rig struct {
	dir    string
	server *server

	mu   sync.Mutex
	next int
}

// NewRig begins to serve, with mount points in the folder dir. It needs root.
func NewRig(dir string) (*Rig, error) {
	disks := filepath.Join(dir, "disks")
	if err := os.MkdirAll(disks, 0o700); err != nil {
		return nil, err
	}
	s, err := serve(disks)
	if err != nil {
		return nil, err
	}
	return &Rig{dir: dir, server: s}, nil
}

// closeTimeout is how long what a worker has started may take to end with it.
const closeTimeout = 10 * time.Second

// Close ends the serving. Everything has to be unmounted. A process that ends
// later than its worker keeps the worker's mounts until then, and with them
// the loop devices.
func (r *Rig) Close() error {
	for deadline := time.Now().Add(closeTimeout); ; time.Sleep(100 * time.Millisecond) {
		err := r.server.fuse.Unmount()
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}

// Format returns a disk of size bytes with an empty file system of the kind.
func (r *Rig) Format(kind FileSystem, size int64) (*Disk, error) {
	d := NewDisk(size)
	a, err := r.attach(plain{d})
	if err != nil {
		return nil, err
	}
	args := append(kind.make(), a.device)
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return d, errors.Join(err, a.detach())
}

// Mount mounts the file system on a disk; its journal is replayed, as after a
// power cut, and what that writes goes to the disk.
func (r *Rig) Mount(kind FileSystem, d *Disk) (*Mount, error) { return r.mount(kind, plain{d}) }

// MountRecording mounts the file system of a recording.
func (r *Rig) MountRecording(kind FileSystem, rec *Recording) (*Mount, error) {
	return r.mount(kind, rec)
}

func (r *Rig) mount(kind FileSystem, b backing) (*Mount, error) {
	a, err := r.attach(b)
	if err != nil {
		return nil, err
	}
	m := &Mount{Dir: filepath.Join(r.dir, a.name), attached: a}
	if err := os.Mkdir(m.Dir, 0o700); err != nil {
		return nil, errors.Join(err, a.detach())
	}
	if err := unix.Mount(a.device, m.Dir, string(kind), unix.MS_NOATIME, kind.options()); err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", kind, err), os.Remove(m.Dir), a.detach())
	}
	return m, nil
}

// Mount is a mounted disk.
type Mount struct {
	Dir      string
	attached *attached
}

// Unmount unmounts it; what was not written is written.
func (m *Mount) Unmount() error {
	if err := unix.Unmount(m.Dir, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", m.Dir, err)
	}
	return errors.Join(os.Remove(m.Dir), m.attached.detach())
}

// attached is a served file with a loop device on it.
type attached struct {
	rig    *Rig
	name   string
	device string
	loop   *os.File
}

func (r *Rig) attach(b backing) (*attached, error) {
	r.mu.Lock()
	r.next++
	a := &attached{rig: r, name: fmt.Sprintf("disk-%d", r.next)}
	r.mu.Unlock()
	r.server.add(a.name, b)
	f, err := os.OpenFile(filepath.Join(r.dir, "disks", a.name), os.O_RDWR, 0)
	if err == nil {
		err = a.configure(f)
		f.Close()
	}
	if err != nil {
		r.server.remove(a.name)
		return nil, fmt.Errorf("attach %s: %w", a.name, err)
	}
	return a, nil
}

// configure takes a free loop device. Another process may be faster; then it
// takes the next.
func (a *attached) configure(f *os.File) error {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer control.Close()
	for range 100 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fmt.Errorf("a free loop device: %w", err)
		}
		a.device = fmt.Sprintf("/dev/loop%d", n)
		if a.loop, err = os.OpenFile(a.device, os.O_RDWR, 0); err != nil {
			return err
		}
		config := unix.LoopConfig{Fd: uint32(f.Fd()), Size: blockSize}
		err = unix.IoctlLoopConfigure(int(a.loop.Fd()), &config)
		if err == nil {
			return nil
		}
		a.loop.Close()
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%s: %w", a.device, err)
		}
	}
	return unix.EBUSY
}

func (a *attached) detach() error {
	_, err := unix.IoctlRetInt(int(a.loop.Fd()), unix.LOOP_CLR_FD)
	err = errors.Join(err, a.loop.Close())
	a.rig.server.remove(a.name)
	return err
}

// ParseFileSystem returns the kind with this name.
func ParseFileSystem(name string) (FileSystem, error) {
	if fs := FileSystem(name); slices.Contains(FileSystems(), fs) {
		return fs, nil
	}
	return "", fmt.Errorf("file system %q is none of %v", name, FileSystems())
}
