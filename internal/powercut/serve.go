package powercut

import (
	"context"
	"fmt"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// backing is what a served file does with what it is asked.
type backing interface {
	diskOf() *Disk
	write(p []byte, off int64)
	flush()
}

// plain is a disk whose writes nobody remembers.
type plain struct{ disk *Disk }

func (p plain) diskOf() *Disk             { return p.disk }
func (p plain) write(b []byte, off int64) { p.disk.write(b, off) }
func (p plain) flush()                    {}

// file is the served file of one disk.
type file struct {
	fs.Inode
	back backing
}

var (
	_ fs.NodeGetattrer  = (*file)(nil)
	_ fs.NodeOpener     = (*file)(nil)
	_ fs.NodeReader     = (*file)(nil)
	_ fs.NodeWriter     = (*file)(nil)
	_ fs.NodeFsyncer    = (*file)(nil)
	_ fs.NodeAllocater  = (*file)(nil)
	_ fs.NodeGetxattrer = (*file)(nil)
)

func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = unix.S_IFREG | 0o600
	out.Size = uint64(f.back.diskOf().Size())
	out.Blksize = blockSize
	return 0
}

// Open turns the page cache off: what the loop driver writes has to be seen
// when it is written, and in that order.
func (f *file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (f *file) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	d := f.back.diskOf()
	p = p[:max(0, min(int64(len(p)), d.Size()-off))]
	d.read(p, off)
	return fuse.ReadResultData(p), 0
}

func (f *file) Write(_ context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	if off+int64(len(p)) > f.back.diskOf().Size() {
		return 0, unix.ENOSPC
	}
	f.back.write(p, off)
	return uint32(len(p)), 0
}

func (f *file) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	f.back.flush()
	return 0
}

// Allocate makes the loop driver's discards and zeroing writes of zeros.
func (f *file) Allocate(_ context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	if mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) == 0 {
		return unix.EOPNOTSUPP
	}
	const piece = 1 << 20
	zeros := make([]byte, min(size, piece))
	for size > 0 {
		n := min(size, piece)
		f.back.write(zeros[:n], int64(off))
		off, size = off+n, size-n
	}
	return 0
}

// Getxattr answers the kernel's questions for capabilities.
func (f *file) Getxattr(context.Context, string, []byte) (uint32, syscall.Errno) {
	return 0, unix.ENODATA
}

// server is the FUSE file system with one file for each disk in use.
type server struct {
	root *fs.Inode
	fuse *fuse.Server
}

func serve(dir string) (*server, error) {
	root := &fs.Inode{}
	s, err := fs.Mount(dir, root, &fs.Options{MountOptions: fuse.MountOptions{
		DirectMountStrict: true, FsName: "powercut", Name: "powercut", MaxWrite: 512 << 10,
	}})
	if err != nil {
		return nil, fmt.Errorf("serve disks at %s: %w", dir, err)
	}
	return &server{root: root, fuse: s}, nil
}

func (s *server) add(name string, b backing) {
	ctx := context.Background()
	s.root.AddChild(name, s.root.NewPersistentInode(ctx, &file{back: b}, fs.StableAttr{Mode: unix.S_IFREG}), true)
}

func (s *server) remove(name string) {
	s.root.RmChild(name)
	_ = s.fuse.EntryNotify(s.root.StableAttr().Ino, name)
}
