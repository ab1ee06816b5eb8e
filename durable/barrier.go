package durable

import (
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// MarkerName is the file in the root whose fsync forces the file system's
// journal. It is empty of meaning; its contents change so that each fsync has
// something to commit.
const MarkerName = "barrier"

// barrierWindow bounds the descriptors that one barrier keeps open while
// write-back of their contents is under way.
const barrierWindow = 1000

// Barrier makes many finished files durable together, with a number of
// flushes that does not depend on how many they are, and without waiting for
// what strangers have written to the same file system.
//
// On ext4 and xfs each file's write-back is started as it is added and waited
// for by [Barrier.Wait], which then forces the journal by an fsync of a small
// marker file: the journal is ordered, so names, sizes and attributes made
// before it are durable with it, and the flush it ends with covers the data.
// Elsewhere Wait is one syncfs. docs/design/0001-order-of-writes.md has the
// proof per file system.
//
// Add may be called from many goroutines; Wait comes after the last of them.
type Barrier struct {
	root *Root
	mu   sync.Mutex // guards the rest; never held during I/O
	open []*os.File
	err  error
}

// NewBarrier returns an empty barrier.
func (r *Root) NewBarrier() *Barrier { return &Barrier{root: r} }

// Add takes over f, whose contents are finished, and starts to write them
// back. It closes f, now or later. The first error is kept and returned by
// Wait as well.
func (b *Barrier) Add(f *os.File) error {
	if err := b.failure(); err != nil || !b.root.ordered() {
		// Without an ordered journal Wait is one syncfs. A failure of
		// write-back is then reported by that syncfs, not by this file.
		if cerr := f.Close(); cerr != nil && err == nil {
			err = b.fail(f.Name(), cerr)
		}
		return err
	}
	if err := unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE); err != nil {
		f.Close()
		return b.fail(f.Name(), err)
	}
	return b.settle(b.keep(f))
}

// keep remembers f and returns the files to wait for now: when the window is
// full, its older half, which has had the longest time to get written.
func (b *Barrier) keep(f *os.File) []*os.File {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open = append(b.open, f)
	if len(b.open) < barrierWindow {
		return nil
	}
	due := slices.Clone(b.open[:barrierWindow/2])
	b.open = append(b.open[:0], b.open[barrierWindow/2:]...)
	return due
}

// take empties the window.
func (b *Barrier) take() []*os.File {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := b.open
	b.open = nil
	return all
}

// writtenBack asks sync_file_range(2) for everything, and to wait for it.
const writtenBack = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER

// settle waits until the files are written back and closes them.
func (b *Barrier) settle(files []*os.File) error {
	for _, f := range files {
		if err := unix.SyncFileRange(int(f.Fd()), 0, 0, writtenBack); err != nil {
			_ = b.fail(f.Name(), err)
		}
		if err := f.Close(); err != nil {
			_ = b.fail(f.Name(), err)
		}
	}
	return b.failure()
}

func (b *Barrier) failure() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

func (b *Barrier) fail(name string, err error) error {
	err = b.root.failedSync(name, err)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		b.err = err
	}
	return b.err
}

// Abandon closes what is open without waiting for it. The barrier cannot be
// used again.
func (b *Barrier) Abandon() {
	for _, f := range b.take() {
		f.Close()
	}
}

// Wait returns nil when the contents of every added file, and every name and
// attribute that was made on this file system before the call, are durable.
// The failure of a sync poisons the root. covers names the trees and files that
// the caller counts on, for the observer.
func (b *Barrier) Wait(covers ...string) error {
	if err := b.root.Poisoned(); err != nil {
		b.Abandon()
		return err
	}
	if err := b.settle(b.take()); err != nil {
		return err
	}
	if err := b.root.flush(); err != nil {
		return err
	}
	b.root.observeCovered(OpBarrier, covers)
	return nil
}

func (r *Root) observeCovered(kind OpKind, names []string) {
	if len(names) > 0 {
		r.observe(Op{Kind: kind, Path: names[0], With: names[1:]})
	}
}

// fewDirs is how many directories are synced one by one where the file system
// has no ordered journal: there a syncfs waits for strangers too.
const fewDirs = 3

// SyncNames makes the names in all of the directories durable, with a number of
// flushes that does not grow with theirs. The failure of a sync poisons the
// root.
func (r *Root) SyncNames(rels ...string) error {
	if len(rels) < 2 || !r.ordered() && len(rels) <= fewDirs {
		return r.SyncDirs(rels...)
	}
	if err := r.may(rels...); err != nil {
		return err
	}
	if err := r.flush(); err != nil {
		return err
	}
	r.observeCovered(OpSyncDir, rels)
	return nil
}

// flush makes what was written back, and every name and attribute, durable.
func (r *Root) flush() error {
	if r.ordered() {
		return r.forceJournal()
	}
	if err := unix.Syncfs(int(r.dir.Fd())); err != nil {
		return r.failedSync(r.path, err)
	}
	return nil
}

// ordered tells whether the root is on a file system for which the cheap
// barrier was proven.
func (r *Root) ordered() bool {
	switch r.fsType {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC:
		return true
	}
	return false
}

// forceJournal dirties the marker and fsyncs it. A marker that cannot be
// written, on a full disk, is no failed sync: nothing that was written before is
// in doubt.
func (r *Root) forceJournal() error {
	r.marker.Lock()
	defer r.marker.Unlock()
	f, err := os.OpenFile(r.Path(MarkerName), os.O_WRONLY|os.O_CREATE|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return kinded("marker", err)
	}
	defer f.Close()
	if err := touch(f); err != nil {
		return kinded("marker", err)
	}
	if err := f.Sync(); err != nil {
		return r.failedSync(f.Name(), err)
	}
	return nil
}

// touch changes the marker, and keeps it small.
func touch(f *os.File) error {
	// An fsync of a clean file would force nothing. A byte that is written
	// again with the same value still dirties page and time; the size goes
	// up and down so that the inode changes within one clock tick too.
	size, err := f.Seek(0, 2)
	if err != nil {
		return err
	}
	if size >= 4096 {
		if err := f.Truncate(0); err != nil {
			return err
		}
		size = 0
	}
	_, err = f.WriteAt([]byte{'.'}, size)
	return err
}
