package durable

import (
	"os"

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
type Barrier struct {
	root *Root
	open []*os.File
	err  error
}

// NewBarrier returns an empty barrier.
func (r *Root) NewBarrier() *Barrier { return &Barrier{root: r} }

// Add takes over f, whose contents are finished, and starts to write them
// back. It closes f, now or later. The first error is kept and returned by
// Wait as well.
func (b *Barrier) Add(f *os.File) error {
	if b.err != nil || !b.root.ordered() {
		// Without an ordered journal Wait is one syncfs. A failure of
		// write-back is then reported by that syncfs, not by this file.
		if err := f.Close(); err != nil && b.err == nil {
			b.err = kinded("close", err)
		}
		return b.err
	}
	if err := unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE); err != nil {
		b.open = append(b.open, f)
		return b.fail(f.Name(), err)
	}
	b.open = append(b.open, f)
	if len(b.open) >= barrierWindow {
		// The oldest have had the longest time to get written.
		return b.drain(barrierWindow / 2)
	}
	return nil
}

// drain waits for the n oldest files and closes them.
func (b *Barrier) drain(n int) error {
	const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	for _, f := range b.open[:n] {
		if err := unix.SyncFileRange(int(f.Fd()), 0, 0, all); err != nil {
			b.fail(f.Name(), err)
		}
		if err := f.Close(); err != nil {
			b.fail(f.Name(), err)
		}
	}
	b.open = append(b.open[:0], b.open[n:]...)
	return b.err
}

func (b *Barrier) fail(name string, err error) error {
	if b.err == nil {
		b.err = b.root.failedSync(name, err)
	}
	return b.err
}

// Abandon closes what is open without waiting for it. The barrier cannot be
// used again.
func (b *Barrier) Abandon() {
	for _, f := range b.open {
		f.Close()
	}
	b.open = nil
}

// Wait returns nil when the contents of every added file, and every name and
// attribute that was made on this file system before the call, are durable.
// Any error poisons the root. covers names the trees and files that the caller
// counts on, for the observer.
func (b *Barrier) Wait(covers ...string) error {
	if err := b.root.Poisoned(); err != nil {
		b.Abandon()
		return err
	}
	if err := b.drain(len(b.open)); err != nil {
		return err
	}
	if b.err != nil {
		return b.err
	}
	var err error
	if b.root.ordered() {
		err = b.root.forceJournal()
	} else {
		err = unix.Syncfs(int(b.root.dir.Fd()))
	}
	if err != nil {
		return b.fail(MarkerName, err)
	}
	for _, c := range covers {
		b.root.observe(Op{Kind: OpBarrier, Path: c})
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

// forceJournal dirties the marker and fsyncs it.
func (r *Root) forceJournal() error {
	f, err := os.OpenFile(r.Path(MarkerName), os.O_WRONLY|os.O_CREATE|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
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
	if _, err := f.WriteAt([]byte{'.'}, size); err != nil {
		return err
	}
	return f.Sync()
}
