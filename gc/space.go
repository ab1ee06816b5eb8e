package gc

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// rules are the limits, as a budget asks for them.
type rules struct{ c *Collector }

// Short implements budget.Rules.
func (r rules) Short(claimed, written, extra int64) int64 {
	return r.c.short(r.c.Limits, claimed, written, extra)
}

// Free implements budget.Rules.
func (r rules) Free(ctx context.Context, short int64) error {
	end, err := r.c.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	freed, err := r.c.makeRoom(ctx, r.c.Limits, short)
	if err == nil && !freed {
		err = &fullError{short: short, usage: r.c.Usage(), limits: r.c.Limits}
	}
	return err
}

// short is by how much there is too little for extra more bytes.
func (c *Collector) short(l Limits, claimed, written, extra int64) int64 {
	short := int64(-everything)
	if l.Size > 0 {
		short = c.taken() + claimed + extra - l.Size
	}
	if l.Free > 0 {
		// What is claimed and not written yet is still free.
		if free, ok := c.disk.free(); ok {
			short = max(short, l.Free-(free-(claimed-written)-extra))
		}
	}
	return short
}

// metadataRoom is what the database and small files beside it may grow by until
// somebody asks again.
const metadataRoom = 1 << 20

// taken is what the store takes of the disk, but for what is on its way.
func (c *Collector) taken() int64 {
	sum := int64(metadataRoom) + c.disk.fixed() + c.disk.metadata() + c.Blobs.Unfinished()
	for name, u := range c.DB.Accounts() {
		switch name {
		case layout.AccountSpareBlobs, layout.AccountSpareLayers: // part of others
		default:
			sum += u.Bytes
		}
	}
	return sum
}

// makeRoom frees so many bytes of the disk, or some, and tells whether it did.
// The caller has begun.
func (c *Collector) makeRoom(ctx context.Context, l Limits, bytes int64) (freed bool, err error) {
	trash := c.DB.Accounts()[layout.AccountTrash]
	if trash.Bytes < bytes {
		n, err := c.release(ctx, l, bytes-trash.Bytes)
		if err != nil {
			return false, err
		}
		freed = n > 0
		trash = c.DB.Accounts()[layout.AccountTrash]
	}
	if trash.Count == 0 {
		return freed, nil
	}
	defer c.Journal.Hurry()()
	return true, c.Journal.Drain(ctx)
}

// release removes what can be had again, the cheapest first: downloads that were
// cut off, blobs that a registry can serve again, build results, and images if they
// may go.
func (c *Collector) release(ctx context.Context, l Limits, bytes int64) (freed int64, err error) {
	for _, from := range []func(context.Context, int64) (int64, error){
		func(ctx context.Context, _ int64) (int64, error) { return c.Blobs.DropUnfinished(ctx, time.Now()) },
		func(ctx context.Context, n int64) (int64, error) {
			if l.Retain == RetainAll {
				return 0, nil
			}
			return c.dropBlobs(ctx, n)
		},
		c.shrinkCache,
		func(ctx context.Context, n int64) (int64, error) {
			if l.Images != EvictImages {
				return 0, nil
			}
			return c.dropImages(ctx, l, n)
		},
	} {
		n, err := from(ctx, bytes-freed)
		if freed += n; err != nil || freed >= bytes {
			return freed, err
		}
	}
	return freed, nil
}

// disk is what is not accounted for in records.
type disk struct {
	root *durable.Root
	once sync.Once
	dirs int64
}

// fixed is what the directories of the format take, however little is in them.
func (d *disk) fixed() int64 {
	d.once.Do(func() {
		d.dirs = allocated(d.root.Path("."))
		for _, dir := range layout.Dirs() {
			d.dirs += allocated(d.root.Path(dir.Path))
		}
	})
	return d.dirs
}

// metadata is what the database and the change log take.
func (d *disk) metadata() int64 {
	return allocated(d.root.Path(layout.DatabaseFile)) + allocated(d.root.Path(layout.LogFile)) + allocated(d.root.Path(layout.DamagedFile))
}

// free is what an unprivileged user could still write.
func (d *disk) free() (bytes int64, ok bool) {
	var fs unix.Statfs_t
	if err := unix.Statfs(d.root.Path("."), &fs); err != nil {
		return 0, false
	}
	return int64(fs.Bavail) * fs.Bsize, true
}

// allocated is what a file takes, 0 if it is not there.
func allocated(path string) int64 {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0
	}
	return st.Blocks * 512
}

// fullError says what takes the room.
type fullError struct {
	short  int64
	usage  Usage
	limits Limits
}

func (e *fullError) Error() string {
	size := func(n int64) string { return units.HumanSizeWithPrecision(float64(n), 3) }
	text := fmt.Sprintf("%s too little room: the store takes %s and %s are on their way", size(e.short), size(e.usage.Total), size(e.usage.InFlight))
	if e.limits.Size > 0 {
		text += fmt.Sprintf(", its limit is %s", size(e.limits.Size))
	}
	if e.limits.Free > 0 {
		text += fmt.Sprintf(", %s are free of which %s are to stay free", size(e.usage.Free), size(e.limits.Free))
	}
	return text + "; nothing more can be had again"
}

func (e *fullError) Unwrap() error { return errdefs.ErrResourceExhausted }
