// Package overlay is a stack of layers as one tree: where its parts stand, and
// how to mount it.
//
// Owns no name on disk and must not know where trees come from. It is used by
// the shim, which must stay small, and by the builder, so it imports nothing of
// the store. The mounts are the caller's to undo; both callers make them in a
// mount namespace that ends with them.
//
// Concurrency: every call stands for itself.
package overlay

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Tree says where the parts of an overlay stand. Paths are absolute.
type Tree struct {
	Lowers []string `json:"lowers,omitempty"` // read-only layers, the topmost first
	Upper  string   `json:"upper,omitempty"`  // where writes go; empty: nothing can be written
	Work   string   `json:"work,omitempty"`   // overlay's work directory, beside Upper
}

// Options are fixed whatever the kernel was built with: redirects and
// metadata-only copies would leave upper directories that mean nothing without
// the mount they were made in.
func Options() []string { return []string{"index=off", "metacopy=off", "redirect_dir=off"} }

// Mount mounts a tree at target, a directory. One directory alone is bound, a
// tree of nothing is an empty read-only one.
//
// The mount API of Linux 5.2 takes a layer at a time (lowerdir+, Linux 6.5),
// so that their number is bounded by overlayfs alone, at 500. On older kernels
// mount(2) takes what fits into a page; more is an error that says so.
func Mount(t Tree, target string) error {
	switch {
	case t.Upper == "" && len(t.Lowers) == 0:
		return unix.Mount("tmpfs", target, "tmpfs", unix.MS_RDONLY, "")
	case len(t.Lowers) == 0:
		return bind(t.Upper, target, 0)
	case t.Upper == "" && len(t.Lowers) == 1:
		return bind(t.Lowers[0], target, unix.MOUNT_ATTR_RDONLY)
	}
	if t.Work != "" {
		// A commit takes the work directory away; overlay wants one.
		if err := os.Mkdir(t.Work, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if err := stack(t, target); err != nil {
		return fmt.Errorf("mount overlay of %d layers: %w", len(t.Lowers), err)
	}
	return nil
}

func bind(source, target string, attr uint64) error {
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

var errNoOverlay = fmt.Errorf("this kernel has no overlay file system (modprobe overlay): %w", unix.ENODEV)

// stack mounts several directories as one.
func stack(t Tree, target string) error {
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENODEV) {
		return errNoOverlay
	}
	if err != nil {
		return stackOld(t, target)
	}
	defer unix.Close(fsfd)
	set := func(key, value string) error {
		if err := unix.FsconfigSetString(fsfd, key, value); err != nil {
			return fmt.Errorf("option %s=%s: %w", key, value, err)
		}
		return nil
	}
	if err := set("source", "overlay"); err != nil {
		return err
	}
	for _, o := range Options() {
		key, value, _ := strings.Cut(o, "=")
		if err := set(key, value); err != nil {
			return err
		}
	}
	for _, lower := range t.Lowers {
		if err := set("lowerdir+", lower); errors.Is(err, unix.EINVAL) {
			return stackOld(t, target)
		} else if err != nil {
			return err
		}
	}
	if t.Upper != "" {
		if err := errors.Join(set("upperdir", t.Upper), set("workdir", t.Work)); err != nil {
			return err
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

// stackOld is for kernels before 6.5.
func stackOld(t Tree, target string) error {
	options := append(Options(), "lowerdir="+strings.Join(t.Lowers, ":"))
	if t.Upper != "" {
		options = append(options, "upperdir="+t.Upper, "workdir="+t.Work)
	}
	data := strings.Join(options, ",")
	if len(data) >= os.Getpagesize() {
		return fmt.Errorf("the options take %d bytes, more than the page that this kernel's mount(2) reads; Linux 6.5 has no such limit", len(data))
	}
	if err := unix.Mount("overlay", target, "overlay", 0, data); !errors.Is(err, unix.ENODEV) {
		return err
	}
	return errNoOverlay
}
