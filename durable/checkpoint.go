package durable

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Checkpoint makes what files hold at the moment, and their names, durable,
// with one flush for all of them; writers may go on meanwhile. A file that is
// not there any more is passed over. A failure poisons the root.
func (r *Root) Checkpoint(rels ...string) error {
	if err := r.may(rels...); err != nil {
		return err
	}
	if r.ordered() { // elsewhere the flush is of contents too
		for _, rel := range rels {
			if err := r.writeBack(rel); err != nil {
				return err
			}
		}
	}
	if err := r.flush(); err != nil {
		return r.failedSync(MarkerName, err)
	}
	r.observeCovered(OpBarrier, rels)
	return nil
}

func (r *Root) writeBack(rel string) error {
	f, err := os.OpenFile(r.Path(rel), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return kinded("checkpoint", err)
	}
	defer f.Close()
	if err := unix.SyncFileRange(int(f.Fd()), 0, 0, writtenBack); err != nil {
		return r.failedSync(rel, err)
	}
	return nil
}
