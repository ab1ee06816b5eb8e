package builder

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/snapshotter"
)

// inMounts runs fn on a thread that has mounts of its own: each tree, mounted
// at the path that fn gets in its place. The thread ends with fn, and the
// mounts with it; nobody else ever sees them. fn must not start goroutines
// that look at the trees.
func inMounts(scratch string, trees []snapshotter.Tree, fn func(dirs []string) error) error {
	base, err := os.MkdirTemp(scratch, "mounts-")
	if err != nil {
		return fmt.Errorf("step: %w: %w", err, errdefs.ErrUnavailable)
	}
	defer os.RemoveAll(base) // empty directories, seen from here
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the runtime ends the thread with the goroutine,
		// since its namespace is not fit for anything else.
		runtime.LockOSThread()
		done <- mountAndRun(base, trees, fn)
	}()
	return <-done
}

func mountAndRun(base string, trees []snapshotter.Tree, fn func([]string) error) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("mount namespace: %w: %w", err, errdefs.ErrPermissionDenied)
	}
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mount namespace: %w: %w", err, errdefs.ErrPermissionDenied)
	}
	dirs := make([]string, len(trees))
	for i, t := range trees {
		dirs[i] = filepath.Join(base, fmt.Sprint(i))
		if err := os.Mkdir(dirs[i], 0o700); err != nil {
			return fmt.Errorf("step: %w: %w", err, errdefs.ErrUnavailable)
		}
		if err := mountTree(t, dirs[i]); err != nil {
			return fmt.Errorf("mount %d layers: %w: %w", len(t.Lowers), err, errdefs.ErrUnavailable)
		}
	}
	err := fn(dirs)
	for _, d := range dirs {
		// Writes have to be in the upper directory when fn has ended.
		err = errors.Join(err, unix.Unmount(d, unix.MNT_DETACH))
	}
	return err
}

// mountTree mounts one tree with mount(2), or, past its page of options, with
// the API that takes a layer at a time (Linux 6.5).
func mountTree(t snapshotter.Tree, at string) error {
	switch {
	case t.Upper == "" && len(t.Lowers) == 0:
		return unix.Mount("tmpfs", at, "tmpfs", unix.MS_RDONLY, "")
	case t.Upper != "" && len(t.Lowers) == 0:
		return unix.Mount(t.Upper, at, "", unix.MS_BIND, "")
	case t.Upper == "" && len(t.Lowers) == 1:
		if err := unix.Mount(t.Lowers[0], at, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		return unix.Mount("", at, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}
	options := append([]string{}, snapshotter.OverlayOptions()...)
	if t.Upper != "" {
		options = append(options, "upperdir="+t.Upper, "workdir="+t.Work)
	}
	data := strings.Join(append(options, "lowerdir="+strings.Join(t.Lowers, ":")), ",")
	if len(data) < os.Getpagesize() {
		return unix.Mount("overlay", at, "overlay", 0, data)
	}
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, l := range t.Lowers {
		options = append(options, "lowerdir+="+l)
	}
	for _, o := range options {
		key, value := o, ""
		if i := strings.LastIndex(strings.SplitN(o, "/", 2)[0], "="); i >= 0 {
			key, value = o[:i], o[i+1:]
		}
		if err := unix.FsconfigSetString(fd, key, value); err != nil {
			return fmt.Errorf("option %s: %w", o, err)
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return err
	}
	mfd, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(mfd)
	return unix.MoveMount(mfd, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH)
}
