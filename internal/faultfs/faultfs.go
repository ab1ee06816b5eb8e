// Package faultfs is a folder seen through a file system whose changes fail
// when they are told to: a disk that is full, or that breaks, at exactly the
// k-th change.
//
// It is a FUSE server (hanwen/go-fuse); the process that serves must not touch
// what it serves. It imports nothing of varve.
package faultfs

import (
	"context"
	"fmt"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Plan says what fails.
type Plan struct {
	At    int           // the change that fails, from 1; 0: none
	Error syscall.Errno // with what
	Stays bool          // and so do all that take space after it, as on a full disk
}

// FS is one mounted view.
type FS struct {
	server *fuse.Server

	mu     sync.Mutex
	plan   Plan
	count  int
	failed []string
}

// Mount shows dir at the empty folder at.
func Mount(dir, at string) (*FS, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(dir, &st); err != nil {
		return nil, err
	}
	f := &FS{}
	data := &fs.LoopbackRoot{Path: dir, Dev: uint64(st.Dev)}
	root := &node{LoopbackNode: fs.LoopbackNode{RootData: data}, fs: f}
	data.RootNode = root
	server, err := fs.Mount(at, root, &fs.Options{NullPermissions: true, MountOptions: fuse.MountOptions{
		DirectMountStrict: true, FsName: "faultfs", Name: "faultfs", MaxWrite: 512 << 10, AllowOther: true,
	}})
	if err != nil {
		return nil, fmt.Errorf("mount at %s: %w", at, err)
	}
	f.server = server
	return f, nil
}

// Close unmounts it.
func (f *FS) Close() error { return f.server.Unmount() }

// Begin counts changes from nothing, by another plan.
func (f *FS) Begin(p Plan) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.plan, f.count, f.failed = p, 0, nil
}

// Count is how many changes there were, and those that failed.
func (f *FS) Count() (n int, failed []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.count, f.failed
}

// change counts one change and tells whether it fails. takes says that it needs
// space.
func (f *FS) change(what, name string, takes bool) syscall.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.count++
	if f.plan.At == 0 || f.count < f.plan.At || f.count > f.plan.At && (!f.plan.Stays || !takes) {
		return 0
	}
	f.failed = append(f.failed, what+" "+name)
	return f.plan.Error
}

type node struct {
	fs.LoopbackNode
	fs *FS
}

// WrapChild makes what go-fuse finds below one of these too.
func (n *node) WrapChild(context.Context, fs.InodeEmbedder) fs.InodeEmbedder {
	return &node{LoopbackNode: fs.LoopbackNode{RootData: n.RootData}, fs: n.fs}
}

func (n *node) name(child string) string { return n.Path(n.Root()) + "/" + child }

func (n *node) Write(ctx context.Context, fh fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	if errno := n.fs.change("write", n.name(""), true); errno != 0 {
		return 0, errno
	}
	return fh.(fs.FileWriter).Write(ctx, data, off)
}

func (n *node) Fsync(ctx context.Context, fh fs.FileHandle, flags uint32) syscall.Errno {
	if errno := n.fs.change("sync", n.name(""), false); errno != 0 {
		return errno
	}
	if f, ok := fh.(fs.FileFsyncer); ok {
		return f.Fsync(ctx, flags)
	}
	return 0 // a directory: nothing here has to last
}

func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if errno := n.fs.change("mkdir", n.name(name), true); errno != 0 {
		return nil, errno
	}
	return n.LoopbackNode.Mkdir(ctx, name, mode, out)
}

func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	if errno := n.fs.change("create", n.name(name), true); errno != 0 {
		return nil, nil, 0, errno
	}
	return n.LoopbackNode.Create(ctx, name, flags, mode, out)
}

func (n *node) Rename(ctx context.Context, name string, parent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	if errno := n.fs.change("rename", n.name(name), true); errno != 0 {
		return errno
	}
	return n.LoopbackNode.Rename(ctx, name, parent, newName, flags)
}

func (n *node) Link(ctx context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if errno := n.fs.change("link", n.name(name), true); errno != 0 {
		return nil, errno
	}
	return n.LoopbackNode.Link(ctx, target, name, out)
}

func (n *node) Symlink(ctx context.Context, target, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if errno := n.fs.change("symlink", n.name(name), true); errno != 0 {
		return nil, errno
	}
	return n.LoopbackNode.Symlink(ctx, target, name, out)
}

func (n *node) Setxattr(ctx context.Context, attr string, data []byte, flags uint32) syscall.Errno {
	if errno := n.fs.change("setxattr", n.name(""), true); errno != 0 {
		return errno
	}
	return n.LoopbackNode.Setxattr(ctx, attr, data, flags)
}
