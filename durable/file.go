package durable

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// File is a regular file of the store that is being written. It belongs to
// one goroutine.
type File struct {
	root *Root
	rel  string
	f    *os.File
	off  int64
}

// CreateFile makes a new regular file, which must not exist, for writing.
// Neither name nor contents are durable yet.
func (r *Root) CreateFile(rel string, perm fs.FileMode) (*File, error) {
	return r.openFile(rel, os.O_CREATE|os.O_EXCL, perm)
}

// AppendFile opens a regular file for writing at its end, making it if need
// be.
func (r *Root) AppendFile(rel string, perm fs.FileMode) (*File, error) {
	return r.openFile(rel, os.O_CREATE, perm)
}

func (r *Root) openFile(rel string, flags int, perm fs.FileMode) (*File, error) {
	if err := r.may(rel); err != nil {
		return nil, err
	}
	_, serr := os.Lstat(r.Path(rel))
	f, err := os.OpenFile(r.Path(rel), os.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC|flags, perm)
	if err != nil {
		return nil, kinded("open for writing", err)
	}
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, kinded("open for writing", err)
	}
	if errors.Is(serr, fs.ErrNotExist) {
		r.observe(Op{Kind: OpCreate, Path: rel})
	}
	return &File{root: r, rel: rel, f: f, off: end}, nil
}

// Write appends p. It implements io.Writer.
func (f *File) Write(p []byte) (int, error) {
	if err := f.root.Poisoned(); err != nil {
		return 0, err
	}
	n, err := f.f.WriteAt(p, f.off)
	if n > 0 {
		f.root.observe(Op{Kind: OpWrite, Path: f.rel, Off: f.off, Data: p[:n]})
	}
	f.off += int64(n)
	if err != nil {
		return n, kinded("write", err)
	}
	return n, nil
}

// ReadAt reads what was written, durable or not. It implements io.ReaderAt.
func (f *File) ReadAt(p []byte, off int64) (int, error) { return f.f.ReadAt(p, off) }

// Size returns the number of bytes written so far.
func (f *File) Size() int64 { return f.off }

// Filled returns how many bytes from its start were written, up to the first
// hole. A power cut may leave one in a file that was written in order: btrfs
// keeps the length without the data that was not on disk yet.
func (f *File) Filled() (int64, error) {
	off, err := unix.Seek(int(f.f.Fd()), 0, unix.SEEK_HOLE)
	switch {
	case errors.Is(err, unix.ENXIO):
		return 0, nil // empty
	case errors.Is(err, unix.EINVAL):
		return f.off, nil // a file system that knows no holes
	case err != nil:
		return 0, kinded("look for holes", err)
	}
	return min(off, f.off), nil
}

// Truncate cuts the file to size bytes; later writes go on from there.
func (f *File) Truncate(size int64) error {
	if err := f.root.Poisoned(); err != nil {
		return err
	}
	if err := f.f.Truncate(size); err != nil {
		return kinded("truncate", err)
	}
	f.off = size
	f.root.observe(Op{Kind: OpResize, Path: f.rel, Off: size})
	return nil
}

// Sync makes contents and size durable, not the name. A failure poisons the
// root.
func (f *File) Sync() error {
	if err := f.root.Poisoned(); err != nil {
		return err
	}
	if err := f.f.Sync(); err != nil {
		return f.root.failedSync(f.f.Name(), err)
	}
	f.root.observe(Op{Kind: OpSync, Path: f.rel})
	return nil
}

// Seal ends the writing of a file that will not change again: it gets the
// mode perm and goes to the barrier, whose Wait makes it durable. The File
// must not be used afterwards.
func (f *File) Seal(b *Barrier, perm fs.FileMode) error {
	if err := f.f.Chmod(perm); err != nil {
		f.f.Close()
		return kinded("seal", err)
	}
	f.root.observe(Op{Kind: OpSetattr, Path: f.rel})
	return b.Add(f.f)
}

// SetModTime sets the file's modification time to t, and the access time too.
func (f *File) SetModTime(t time.Time) error {
	ts := []unix.Timespec{unix.NsecToTimespec(t.UnixNano()), unix.NsecToTimespec(t.UnixNano())}
	if err := unix.UtimesNanoAt(int(f.f.Fd()), "", ts, unix.AT_EMPTY_PATH); err != nil {
		return kinded("set time", err)
	}
	f.root.observe(Op{Kind: OpSetattr, Path: f.rel})
	return nil
}

// ModTime returns the file's modification time.
func (f *File) ModTime() (time.Time, error) {
	fi, err := f.f.Stat()
	if err != nil {
		return time.Time{}, kinded("stat", err)
	}
	return fi.ModTime(), nil
}

// Forget lets go of what the page cache has of the file and the kernel has
// written back: later reads are from the disk. Of what a write-back that failed
// could not write, the page cache would go on to show what was never there.
func (f *File) Forget() error {
	if err := unix.Fadvise(int(f.f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return kinded("forget "+f.rel, err)
	}
	return nil
}

// Close closes the file without syncing it.
func (f *File) Close() error { return f.f.Close() }

var tempCounter atomic.Uint64

// tempName returns a name beside rel that no other caller uses. The prefix
// says to recovery that whatever carries it was never published.
func tempName(rel string) string {
	n := strconv.FormatUint(tempCounter.Add(1), 36)
	return filepath.Join(filepath.Dir(rel), TempPrefix+strconv.Itoa(os.Getpid())+"-"+n+"-"+filepath.Base(rel))
}

// TempPrefix begins the name of every file that [Root.WriteFile] has not yet
// published.
const TempPrefix = ".tmp-"

// WriteFile makes data the whole contents of rel, in place of what was there.
// After nil name and contents are durable; after an error or a power cut the
// file has its old contents, or is absent if it had none.
func (r *Root) WriteFile(rel string, data []byte, perm fs.FileMode) error {
	if err := r.may(rel); err != nil {
		return err
	}
	tmp := tempName(rel)
	f, err := r.CreateFile(tmp, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil && cerr != nil {
		err = kinded("close", cerr)
	}
	if err != nil {
		os.Remove(r.Path(tmp))
		return err
	}
	if err := r.Replace(tmp, rel); err != nil {
		os.Remove(r.Path(tmp))
		return err
	}
	return nil
}

// Replace gives the file old, whose contents are durable, the name rel in the
// same directory, in place of what had it. After nil that is durable.
func (r *Root) Replace(old, rel string) error {
	if err := r.may(old, rel); err != nil {
		return err
	}
	if err := os.Rename(r.Path(old), r.Path(rel)); err != nil {
		return kinded("replace file", err)
	}
	r.observe(Op{Kind: OpRename, Path: old, To: rel})
	return r.SyncDirs(filepath.Dir(rel))
}
