package foreign

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Engine is whose store it is.
type Engine string

// The engines.
const (
	OCILayout  Engine = "oci-layout" // a folder, or a tar file of one
	Docker     Engine = "docker"     // dockerd's --data-root, storage driver overlay2
	Containerd Engine = "containerd" // containerd's root, snapshotter overlayfs
)

// Options for [Run].
type Options struct {
	Engine  Engine
	Root    string // the store's directory
	Workers int    // 0 means one for each processor, at most 4
	Limit   int    // of findings that are listed; 0 means 100,000. All are counted.
	// Progress is told of bytes read and to read, about, from several
	// goroutines. May be nil.
	Progress func(done, total int64)
}

const (
	maxWorkers   = 4
	defaultLimit = 100_000
)

// Run checks a store. An error means that the check could not take place:
// ErrNotFound for no such store, ErrUnavailable for one that is locked or
// cannot be read, ErrNotImplemented for a kind of store that is not known,
// ErrInvalidArgument for options, or the end of ctx. A nil error means that
// everything was looked at that is there; what was found is in the report.
func Run(ctx context.Context, opts Options) (*Report, error) {
	checks := map[Engine]func(*checker) error{
		OCILayout: (*checker).layout, Docker: (*checker).docker, Containerd: (*checker).containerd,
	}
	check, ok := checks[opts.Engine]
	if !ok {
		return nil, fmt.Errorf("fsck: engine %q is none of %s, %s and %s: %w", opts.Engine, OCILayout, Docker, Containerd, errdefs.ErrInvalidArgument)
	}
	if opts.Workers <= 0 {
		opts.Workers = min(runtime.GOMAXPROCS(0), maxWorkers)
	}
	if opts.Limit <= 0 {
		opts.Limit = defaultLimit
	}
	c := &checker{ctx: ctx, opts: opts, report: &Report{
		Engine: opts.Engine, Root: opts.Root, Findings: []Finding{}, Counts: map[Kind]int64{}, Started: time.Now().UTC(),
	}}
	err := check(c)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("fsck of %s %s: %w", opts.Engine, opts.Root, err)
	}
	slices.SortStableFunc(c.report.Findings, func(a, b Finding) int {
		return strings.Compare(a.Object+"\x00"+a.Path, b.Object+"\x00"+b.Path)
	})
	c.report.Finished = time.Now().UTC()
	return c.report, nil
}

// checker is one look at a store.
type checker struct {
	ctx  context.Context
	opts Options

	mu     sync.Mutex // guards what follows
	report *Report
	total  int64 // bytes to read, about
}

func (c *checker) add(f Finding) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.add(f, c.opts.Limit)
}

// expect adds to what Progress is told will be read.
func (c *checker) expect(bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.total += bytes
}

// read accounts for bytes that were read, and for files that were compared.
func (c *checker) read(bytes, files int64) {
	c.mu.Lock()
	c.report.Bytes += bytes
	c.report.Files += files
	done, total := c.report.Bytes, max(c.total, c.report.Bytes)
	c.mu.Unlock()
	if c.opts.Progress != nil && bytes > 0 {
		c.opts.Progress(done, total)
	}
}

// watched is a reader that ends with the context and accounts for what it
// reads.
type watched struct {
	c *checker
	r io.Reader
}

func (w watched) Read(p []byte) (int, error) {
	if err := w.c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := w.r.Read(p)
	w.c.read(int64(n), 0)
	return n, err
}

// isDir tells whether the store has the folder at all.
func isDir(name string) bool {
	fi, err := os.Stat(name)
	return err == nil && fi.IsDir()
}

// object is what findings are about, with what they have in common.
type object struct {
	c      *checker
	name   string   // "layer sha256:…"
	images []string // names of the images that it is part of
	// source is where its contents can be had again, as a sentence; empty:
	// nowhere that this store knows of.
	source string
}

// lost is the repair of what nothing in a store has again.
const lost = "nothing in this store has it again: build the image anew, or load it from an archive"

// place is where something is.
type place struct {
	path string // below the store's directory
	file string // in the image, for a file of a layer
}

// found reports that contents are gone or wrong.
func (o *object) found(kind Kind, at place, format string, args ...any) {
	severity, repair := layout.Damage, o.source
	if o.source == "" {
		severity, repair = layout.Loss, lost
	}
	o.say(kind, severity, at, repair, format, args...)
}

// say reports anything else.
func (o *object) say(kind Kind, severity layout.Severity, at place, repair, format string, args ...any) {
	o.c.add(Finding{
		Kind: kind, Severity: severity, Object: o.name, Images: o.images, Path: at.path, File: at.file,
		Detail: fmt.Sprintf(format, args...), Repair: repair,
	})
}
