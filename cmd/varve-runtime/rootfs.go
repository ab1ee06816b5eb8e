package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"

	"varve.dev/overlay"
	"varve.dev/runtime"
)

// mountRootfs mounts the container's overlay in this process's own mount
// namespace and returns where.
func mountRootfs(dir string, spec *runtime.Spec) (string, error) {
	if err := ownNamespace(); err != nil {
		return "", err
	}
	target := filepath.Join(dir, "rootfs")
	if err := os.Mkdir(target, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	return target, overlay.Mount(spec.Rootfs, target)
}

// mountOverlays mounts the overlays among a container's mounts beside its
// root, and turns them into binds of the paths wanted in them.
func mountOverlays(dir string, spec *runtime.Spec) error {
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		if m.Type != "overlay" {
			continue
		}
		at := filepath.Join(dir, fmt.Sprintf("overlay-%d", i))
		if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if err := overlay.Mount(*m.Overlay, at); err != nil {
			return fmt.Errorf("mount at %s: %w", m.Target, err)
		}
		source, err := securejoin.SecureJoin(at, m.Source)
		if err != nil {
			return fmt.Errorf("mount at %s: %w", m.Target, err)
		}
		m.Type, m.Source = "bind", source
	}
	return nil
}

// mountSecrets puts secrets into files in memory, which nobody but this
// process's mount namespace has, and turns them into binds of those.
func mountSecrets(dir string, spec *runtime.Spec) error {
	at := filepath.Join(dir, "secrets")
	made := false
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		if m.Type != "secret" {
			continue
		}
		if !made {
			if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
				return err
			}
			if err := unix.Mount("tmpfs", at, "tmpfs", unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0700"); err != nil {
				return fmt.Errorf("mount secrets: %w", err)
			}
			made = true
		}
		file := filepath.Join(at, fmt.Sprint(i))
		if err := os.WriteFile(file, m.Secret.Data, 0o600); err != nil {
			return fmt.Errorf("secret at %s: %w", m.Target, err)
		}
		if err := errors.Join(os.Chown(file, m.Secret.UID, m.Secret.GID), os.Chmod(file, fs.FileMode(m.Secret.Mode))); err != nil {
			return fmt.Errorf("secret at %s: %w", m.Target, err)
		}
		m.Type, m.Source, m.Secret = "bind", file, nil
		m.Options = append(m.Options, "nodev", "nosuid", "noexec")
	}
	return nil
}

// ownNamespace makes sure that no mount made here is seen elsewhere. Whoever
// starts the shim gives it a mount namespace; started by hand it refuses.
func ownNamespace() error {
	mine, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	parent, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", os.Getppid()))
	if err == nil && parent == mine {
		return errors.New("started in its caller's mount namespace: it wants one of its own (unshare --mount)")
	}
	return nil
}

// makeStubs makes the mount targets that are not in the root file system, and
// returns those to take away again: what was only made to be mounted on does
// not belong into a layer. Of a path that lacks several elements it makes the
// first, and libcontainer the rest. The folders that they are in keep their
// times. What cannot be made here is libcontainer's to make, or to refuse.
func makeStubs(rootfs string, spec *runtime.Spec) (stubs []string) {
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return nil
	}
	defer root.Close()
	targets := []runtime.Mount{{Target: "/proc"}, {Target: "/dev"}, {Target: "/sys"}}
	for _, m := range append(targets, spec.Mounts...) {
		at, whole := "", strings.Trim(path.Clean(m.Target), "/")
		for element := range strings.SplitSeq(whole, "/") {
			at = path.Join(at, element)
			if _, err := root.Lstat(at); errors.Is(err, fs.ErrNotExist) {
				stubs = append(stubs, at)
				keepTimes(root, path.Dir(at), func() { makeStub(root, at, at == whole && ofFile(m)) })
				break
			}
		}
	}
	return stubs
}

// ofFile tells whether a mount shows a file. Secrets are binds by now.
func ofFile(m runtime.Mount) bool {
	fi, err := os.Stat(m.Source)
	return m.Type == "bind" && err == nil && !fi.IsDir()
}

func makeStub(root *os.Root, at string, file bool) {
	if !file {
		_ = root.Mkdir(at, 0o755)
		return
	}
	if f, err := root.OpenFile(at, os.O_CREATE|os.O_WRONLY, 0o644); err == nil {
		f.Close()
	}
}

// keepTimes changes what is in a folder and leaves the folder its times.
func keepTimes(root *os.Root, dir string, change func()) {
	fi, err := root.Stat(dir)
	change()
	if err == nil {
		st := fi.Sys().(*syscall.Stat_t)
		_ = root.Chtimes(dir, time.Unix(st.Atim.Unix()), fi.ModTime())
	}
}

// removeStubs takes the mount targets away again that are still empty: one
// that stays would be part of a layer.
func removeStubs(rootfs string, stubs []string) error {
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, s := range stubs {
		var err error
		keepTimes(root, path.Dir(s), func() { err = removeEmpty(root, s) })
		if err != nil {
			return fmt.Errorf("take a mount's target away: %w", err)
		}
	}
	return nil
}

// removeEmpty removes a file of no length, or a directory that holds nothing
// but such. What holds more, or is gone, is as it should be.
func removeEmpty(root *os.Root, name string) error {
	fi, err := root.Lstat(name)
	if err != nil {
		return unless(err, fs.ErrNotExist)
	}
	if fi.IsDir() {
		f, err := root.Open(name)
		if err != nil {
			return err
		}
		entries, err := f.ReadDir(-1)
		f.Close()
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := removeEmpty(root, path.Join(name, e.Name())); err != nil {
				return err
			}
		}
	} else if !fi.Mode().IsRegular() || fi.Size() > 0 {
		return nil
	}
	return unless(root.Remove(name), unix.ENOTEMPTY, fs.ErrNotExist)
}

// unless returns err, but for these.
func unless(err error, fine ...error) error {
	for _, f := range fine {
		if errors.Is(err, f) {
			return nil
		}
	}
	return err
}
