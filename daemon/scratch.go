package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
)

// scratch is a folder under --state for what lives as long as a call: mount
// points, bundles of build steps, uploaded contexts. Its lock says that its
// owner lives; the next owner of any store removes what has none.
type scratch struct {
	dir  string
	lock *os.File
}

const scratchPrefix = "scratch-"

// newScratch makes a folder in state, and removes those of processes that
// were killed.
func newScratch(state string) (*scratch, error) {
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w: %w", err, errdefs.ErrUnavailable)
	}
	removeAbandoned(state)
	for {
		dir, err := os.MkdirTemp(state, scratchPrefix)
		if err != nil {
			return nil, fmt.Errorf("state directory: %w: %w", err, errdefs.ErrUnavailable)
		}
		// Somebody else may have taken it for abandoned before it was
		// locked.
		if lock := lockDir(dir); lock != nil {
			return &scratch{dir: dir, lock: lock}, nil
		}
	}
}

// Close removes the folder.
func (s *scratch) Close() error {
	return errors.Join(os.RemoveAll(s.dir), s.lock.Close())
}

// removeAbandoned leaves alone what it cannot remove: it is in nobody's way.
func removeAbandoned(state string) {
	entries, err := os.ReadDir(state)
	if err != nil {
		return
	}
	for _, e := range entries {
		dir := filepath.Join(state, e.Name())
		if !e.IsDir() || !strings.HasPrefix(e.Name(), scratchPrefix) {
			continue
		}
		if lock := lockDir(dir); lock != nil {
			_ = os.RemoveAll(dir)
			lock.Close()
		}
	}
}

// lockDir returns the lock of a folder, or nil if somebody has it or the
// folder is gone.
func lockDir(dir string) *os.File {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		f.Close()
		return nil
	}
	return f
}
