package builder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sync"

	"github.com/moby/buildkit/solver/pb"
	copyfs "github.com/tonistiigi/fsutil/copy"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/overlay"
	"varve.dev/runtime"
)

// cache mounts a directory that stays from build to build. It begins as a copy
// of what the mount's source shows; another source makes it another directory,
// as in BuildKit.
func (e *execution) cache(ctx context.Context, m *pb.Mount) error {
	on, err := e.input(m)
	if err != nil {
		return err
	}
	k := newKeyHash("cachemount")
	k.add(m.CacheOpt.GetID())
	if on != "" {
		begin, err := e.j.digestOf(ctx, on, everything)
		if err != nil {
			return err
		}
		k.add(begin, relative(m.Selector))
	}
	key := k.sum()
	if e.v.meta != nil && e.v.meta.IgnoreCache && e.j.once("drop "+key) {
		if err := e.j.b.Space.DropMount(ctx, key); err != nil {
			return err
		}
	}
	rel := layout.CacheMountPath(key)
	dir := e.j.b.Root.Path(rel)
	switch m.CacheOpt.GetSharing() {
	case pb.CacheSharingOpt_LOCKED:
		unlock, err := e.j.b.mounts.lock(ctx, rel)
		if err != nil {
			return err
		}
		e.unlock = append(e.unlock, unlock)
	case pb.CacheSharingOpt_PRIVATE:
		unlock, free := e.j.b.mounts.try(rel)
		if free {
			e.unlock = append(e.unlock, unlock)
			break
		}
		// Somebody has it: one for this step alone.
		own, err := os.MkdirTemp(e.j.b.Scratch, "cache-")
		if err != nil {
			return fmt.Errorf("cache mount: %w: %w", err, errdefs.ErrUnavailable)
		}
		e.scratch = append(e.scratch, own)
		dir = filepath.Join(own, "cache")
		if err := e.fill(ctx, dir, on, m); err != nil {
			return err
		}
		rel = ""
	}
	if rel != "" {
		end, err := e.j.b.Space.UseMount(ctx, key)
		if err != nil {
			return err
		}
		e.unlock = append(e.unlock, end)
		if err := e.beginCache(ctx, rel, on, m); err != nil {
			return err
		}
	}
	e.spec.Mounts = append(e.spec.Mounts, runtime.Mount{Type: "bind", Source: dir, Target: m.Dest, ReadOnly: m.Readonly})
	return nil
}

// beginCache makes a cache's directory if it is not there. It gets its name
// when it has all that it begins with.
func (e *execution) beginCache(ctx context.Context, rel string, on layout.SnapshotKey, m *pb.Mount) error {
	unlock, err := e.j.b.mounts.lock(ctx, rel+" begins")
	if err != nil {
		return err
	}
	defer unlock()
	root := e.j.b.Root
	if _, err := os.Lstat(root.Path(rel)); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	begun := rel + layout.CacheMountBegun
	if err := e.fill(ctx, root.Path(begun), on, m); err != nil {
		return errors.Join(err, root.RemoveAll(begun))
	}
	durable.At(layout.PointCacheMountBegun)
	return root.Rename(begun, rel)
}

// fill makes dir, which is not there, a copy of what a cache mount begins
// with.
func (e *execution) fill(ctx context.Context, dir string, on layout.SnapshotKey, m *pb.Mount) error {
	if on == "" {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("cache mount %s: %w: %w", m.Dest, err, errdefs.ErrUnavailable)
		}
		return nil
	}
	tree, err := e.j.b.Snaps.Tree(ctx, on)
	if err != nil {
		return err
	}
	return inMounts(e.j.b.Scratch, []overlay.Tree{tree}, func(dirs []string) error {
		err := copyfs.Copy(ctx, dirs[0], path.Join("/", m.Selector), filepath.Dir(dir), filepath.Base(dir))
		if err == nil {
			return nil
		}
		return fmt.Errorf("cache mount %s begins with %s: %w", m.Dest, path.Join("/", m.Selector), inContainer(err, dirs))
	})
}

// mountLocks serialise the use of cache mounts in this process, which is the
// only one that has the store open.
type mountLocks struct {
	mu    *sync.Mutex
	taken map[string]chan struct{}
}

func newMountLocks() mountLocks { return mountLocks{new(sync.Mutex), map[string]chan struct{}{}} }

func (l *mountLocks) try(name string) (unlock func(), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.taken[name] != nil {
		return nil, false
	}
	over := make(chan struct{})
	l.taken[name] = over
	return func() {
		l.mu.Lock()
		delete(l.taken, name)
		l.mu.Unlock()
		close(over)
	}, true
}

func (l *mountLocks) lock(ctx context.Context, name string) (func(), error) {
	for {
		if unlock, ok := l.try(name); ok {
			return unlock, nil
		}
		l.mu.Lock()
		over := l.taken[name]
		l.mu.Unlock()
		if over == nil {
			continue
		}
		select {
		case <-over:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
