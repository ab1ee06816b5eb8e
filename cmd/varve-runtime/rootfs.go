package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"

	"varve.dev/runtime"
)

// mountRootfs mounts the container's overlay in this process's own mount
// namespace and returns where.
//
// The mount API of Linux 5.2 takes a layer at a time (lowerdir+, Linux 6.5),
// so that their number is bounded by overlayfs alone, at 500. On older kernels
// mount(2) takes what fits into a page.
func mountRootfs(dir string, spec *runtime.Spec) (string, error) {
	if err := ownNamespace(); err != nil {
		return "", err
	}
	target := filepath.Join(dir, "rootfs")
	if err := os.Mkdir(target, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	return target, mountTree(spec.Rootfs, target)
}

// mountTree mounts layers at target: bound where there is only one.
func mountTree(r runtime.Rootfs, target string) error {
	switch {
	case len(r.Lowers) == 0:
		return bindMount(r.Upper, target, 0)
	case len(r.Lowers) == 1 && r.Upper == "":
		return bindMount(r.Lowers[0], target, unix.MOUNT_ATTR_RDONLY)
	}
	if r.Work != "" {
		// A commit takes the work directory away; overlay wants one.
		if err := os.Mkdir(r.Work, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if err := mountOverlay(r, target); err != nil {
		return fmt.Errorf("mount overlay of %d layers: %w", len(r.Lowers), err)
	}
	return nil
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
		if err := mountTree(*m.Overlay, at); err != nil {
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

func bindMount(source, target string, attr uint64) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("bind %s: %w", source, err)
	}
	defer unix.Close(fd)
	if attr != 0 {
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: attr}); err != nil {
			return fmt.Errorf("bind %s: %w", source, err)
		}
	}
	return unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// fixedOptions keep an upper directory meaningful without the mount that it
// was made in; the same as snapshotter's.
var fixedOptions = [][2]string{{"index", "off"}, {"metacopy", "off"}, {"redirect_dir", "off"}}

func mountOverlay(r runtime.Rootfs, target string) error {
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return mountOverlayOld(r, target)
	}
	defer unix.Close(fsfd)
	options := append([][2]string{{"source", "overlay"}}, fixedOptions...)
	for _, lower := range r.Lowers {
		options = append(options, [2]string{"lowerdir+", lower})
	}
	if r.Upper != "" {
		options = append(options, [2]string{"upperdir", r.Upper}, [2]string{"workdir", r.Work})
	}
	for _, o := range options {
		if err := unix.FsconfigSetString(fsfd, o[0], o[1]); err != nil {
			if o[0] == "lowerdir+" && errors.Is(err, unix.EINVAL) {
				return mountOverlayOld(r, target)
			}
			return fmt.Errorf("option %s=%s: %w", o[0], o[1], err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return err
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(mfd)
	return unix.MoveMount(mfd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// mountOverlayOld is for kernels before 6.5.
func mountOverlayOld(r runtime.Rootfs, target string) error {
	var options []string
	for _, o := range fixedOptions {
		options = append(options, o[0]+"="+o[1])
	}
	options = append(options, "lowerdir="+strings.Join(r.Lowers, ":"))
	if r.Upper != "" {
		options = append(options, "upperdir="+r.Upper, "workdir="+r.Work)
	}
	data := strings.Join(options, ",")
	if len(data) >= os.Getpagesize() {
		return fmt.Errorf("the options take %d bytes, more than the page that this kernel's mount(2) reads; Linux 6.5 has no such limit", len(data))
	}
	return unix.Mount("overlay", target, "overlay", 0, data)
}

// missingTargets returns the mount targets that are not in the root file
// system: libcontainer makes them, and what was only made to be mounted on
// does not belong into a layer. Of a path that lacks several elements it is
// the first.
func missingTargets(rootfs string, spec *runtime.Spec) []string {
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return nil
	}
	defer root.Close()
	targets := []string{"/proc", "/dev", "/sys"}
	for _, m := range spec.Mounts {
		targets = append(targets, m.Target)
	}
	var missing []string
	for _, t := range targets {
		at := ""
		for element := range strings.SplitSeq(strings.Trim(path.Clean(t), "/"), "/") {
			at = path.Join(at, element)
			if _, err := root.Lstat(at); errors.Is(err, fs.ErrNotExist) {
				missing = append(missing, at)
				break
			}
		}
	}
	return missing
}

// removeStubs takes the mount targets away again that are still empty.
func removeStubs(rootfs string, stubs []string) {
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return
	}
	defer root.Close()
	for _, s := range stubs {
		removeEmpty(root, s)
	}
}

// removeEmpty removes a file of no length, or a directory that holds nothing
// but such.
func removeEmpty(root *os.Root, name string) {
	fi, err := root.Lstat(name)
	if err != nil {
		return
	}
	if fi.IsDir() {
		f, err := root.Open(name)
		if err != nil {
			return
		}
		entries, _ := f.ReadDir(-1)
		f.Close()
		for _, e := range entries {
			removeEmpty(root, path.Join(name, e.Name()))
		}
	} else if !fi.Mode().IsRegular() || fi.Size() > 0 {
		return
	}
	_ = root.Remove(name) // fails, rightly, for a directory that is not empty
}
