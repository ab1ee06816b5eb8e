package builder

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/overlay"
)

// inMounts runs fn on a thread that has mounts of its own: each tree, mounted
// at the path that fn gets in its place. The thread ends with fn, and the
// mounts with it; nobody else ever sees them. fn must not start goroutines
// that look at the trees.
func inMounts(scratch string, trees []overlay.Tree, fn func(dirs []string) error) error {
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

func mountAndRun(base string, trees []overlay.Tree, fn func([]string) error) error {
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
		if err := overlay.Mount(t, dirs[i]); err != nil {
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

// openMount mounts a tree where nobody else sees it, and opens a directory in
// it. The mount ends when the root that it returns, and whatever was opened
// through that, is closed.
func openMount(scratch string, tree overlay.Tree, name string) (root *os.Root, err error) {
	err = inMounts(scratch, []overlay.Tree{tree}, func(dirs []string) error {
		p, err := fs.RootPath(dirs[0], name)
		if err == nil {
			root, err = os.OpenRoot(p)
		}
		return inContainer(err, dirs)
	})
	return root, err
}

// relative makes a path of the container one in a directory.
func relative(name string) string {
	rel := filepath.Clean("/" + name)[1:]
	if rel == "" {
		return "."
	}
	return rel
}
