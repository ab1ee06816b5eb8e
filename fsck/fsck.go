package fsck

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Options for [Run].
type Options struct {
	Root  string       // the store's directory
	Level layout.Level // empty: Normal
	With  []string     // invariants to check beyond the level, by number
	// DB is the open database of a store that is in use; nil opens the file
	// read-only, which needs the store to be closed.
	DB Database
	// Online says that operations may be under way. DB implies it: nobody
	// else can have a database open that is not in use. Without DB it is
	// refused, for the database's lock keeps a second process out.
	Online bool
	// Boot is the id of the running boot, whose staging folder belongs to
	// operations under way. Empty: the kernel is asked. Only online.
	Boot    string
	Workers int // for deep checks; 0 means two for each processor, at most 8
	// Rate is how many bytes a second all workers of a deep check read and
	// hash together, at most; 0 means as many as they can.
	Rate int64
	// Of chooses images (name, digest, id), containers (name, id), layers
	// (id) or blobs (digest), with all that they stand on; nothing: the store.
	// Of ids and digests the beginning is enough.
	Of []string
	// Sample is the share of the blobs, and of the files of layers, whose
	// contents a deep check reads, drawn by Draw, or anew if that is 0;
	// everything else is compared as always. 0 or 1: all.
	Sample float64
	Draw   uint64
	// Resume is a deep check that was cut off and is to go on, in place of
	// Of and Sample. What it has read is not read again.
	Resume *layout.CheckRecord
	// Mark is told from time to time, and when a deep check is cut off, from
	// where it could go on; by several goroutines, one at a time. May be nil.
	Mark func(layout.CheckRecord)
	// Progress is told of bytes read and to read, from several goroutines.
	// May be nil.
	Progress func(done, total int64)
}

// Database is what is read of a database that somebody has open.
type Database interface {
	View(func(*bolt.Tx) error) error
}

const maxWorkers = 8

// burst is what is read at once when the rate is limited.
const burst = 128 << 10

// Run checks a store. An error means that the check could not take place:
// ErrNotFound for no store or nothing that is called as chosen, ErrUnavailable
// for one that is open elsewhere or cannot be read, ErrFailedPrecondition for a
// format that is not known, ErrInvalidArgument for options, or the end of ctx. A
// nil error means that every check of the level was made; what they found is in
// the report.
func Run(ctx context.Context, opts Options) (*Report, error) {
	if err := opts.fill(); err != nil {
		return nil, err
	}
	now := time.Now().UTC()
	state := layout.CheckRecord{Started: now, Of: opts.Of, Sample: opts.Sample, Draw: opts.Draw}
	for state.Draw == 0 {
		state.Draw = rand.Uint64()
	}
	report := &Report{Root: opts.Root, Level: opts.Level, Findings: []Finding{}}
	if opts.Resume != nil {
		state, report.Resumed = *opts.Resume, now
	}
	report.Started, report.Of, report.Sample, report.Draw = state.Started, state.Of, state.Sample, state.Draw
	c := &checker{ctx: ctx, opts: opts, state: state, mark: newMarker(opts.Mark, state), limit: rate.NewLimiter(rate.Inf, burst)}
	c.hashes = c.reads
	c.files.Store(state.Files)
	c.bytes.Store(state.Bytes)
	if opts.Rate > 0 {
		c.limit.SetLimit(rate.Limit(opts.Rate))
	}
	err := c.run()
	if ctx.Err() != nil {
		c.mark.end(c)
	}
	if err == nil && c.online() && len(c.findings) > 0 {
		err = c.again()
	}
	if err != nil {
		return nil, fmt.Errorf("fsck %s: %w", opts.Root, err)
	}
	report.Findings = append(report.Findings, c.findings...)
	report.sort()
	if c.rec != nil {
		report.Blobs, report.Layers = c.count()
	}
	report.Files, report.Bytes = c.files.Load(), c.bytes.Load()
	report.Finished = time.Now().UTC()
	return report, nil
}

// fill checks the options and sets what was left out.
func (o *Options) fill() error {
	if o.Level == "" {
		o.Level = layout.Normal
	}
	if !slices.Contains(levels, o.Level) {
		return fmt.Errorf("fsck: level %q is not quick, normal or deep: %w", o.Level, errdefs.ErrInvalidArgument)
	}
	if o.Online && o.DB == nil {
		return fmt.Errorf("fsck: a store in use is checked through its open database: %w", errdefs.ErrInvalidArgument)
	}
	if o.Rate < 0 {
		return fmt.Errorf("fsck: a rate of %d bytes a second: %w", o.Rate, errdefs.ErrInvalidArgument)
	}
	if o.Sample < 0 || o.Sample > 1 {
		return fmt.Errorf("fsck: a sample of %g: %w", o.Sample, errdefs.ErrInvalidArgument)
	}
	if o.Sample == 1 {
		o.Sample = 0
	}
	if o.Resume != nil && (o.Level != layout.Deep || o.Of != nil || o.Sample != 0) {
		return fmt.Errorf("fsck: only a deep check goes on, as what it began as: %w", errdefs.ErrInvalidArgument)
	}
	if o.Level != layout.Deep {
		o.Mark = nil
	}
	if o.Workers <= 0 {
		o.Workers = min(2*runtime.GOMAXPROCS(0), maxWorkers) // they wait for the disk, too
	}
	if o.Boot == "" && o.DB != nil {
		id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return fmt.Errorf("fsck: boot id: %w: %w", err, errdefs.ErrUnavailable)
		}
		o.Boot = strings.TrimSpace(string(id))
	}
	return nil
}

// checker is one look at a store.
type checker struct {
	ctx  context.Context
	opts Options
	root *os.File // the store's directory
	dirs dirs
	db   *bolt.DB // of a closed store, open to keep it closed to others
	rec  *records // nil: the database is too damaged

	damage    []damage // what load found, for M1 to M3
	manifests map[layout.LayerID]summary
	state     layout.CheckRecord // what it is of, and where it began
	mark      *marker
	chosen    map[string]bool              // if not nil, the objects that are spoken of
	hashes    func(layout.BlobDigest) bool // whether B3 is held for a blob
	within    map[layout.Node]bool         // what these are of
	only      map[string]bool              // if not nil, those of them that B3 and L4 look at
	blobs     *queue[layout.BlobDigest]    // for B3 to read
	layers    *queue[layout.LayerID]       // for L4
	limit     *rate.Limiter                // of what deep checks read
	total     int64                        // bytes that deep checks will read, about
	bytes     atomic.Int64
	files     atomic.Int64

	mu       sync.Mutex // guards findings
	findings []Finding
}

func (c *checker) online() bool { return c.opts.DB != nil }

// run looks at everything once.
func (c *checker) run() (err error) {
	if c.root, err = os.OpenFile(c.opts.Root, os.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		return fmt.Errorf("no store is there: %w: %w", err, errdefs.ErrNotFound)
	}
	defer c.root.Close()
	defer func() { err = errors.Join(err, c.closeDB()) }()
	// Directories first: what is recorded when the database is read was
	// published before, and so cannot be missing for being new; what is
	// listed and not recorded is looked at again.
	if c.dirs, err = c.list(); err != nil {
		return err
	}
	if err := c.load(); err != nil {
		return err
	}
	if err := c.choose(); err != nil {
		return err
	}
	if c.rec != nil && (c.asked("B3") || c.asked("L4")) {
		c.plan()
	}
	if c.rec != nil && (c.asked("L3") || c.asked("L4") || c.asked("L6")) {
		c.readManifests()
	}
	for _, inv := range layout.Invariants() {
		if c.ctx.Err() != nil {
			return c.ctx.Err()
		}
		c.hold(inv)
	}
	return c.ctx.Err()
}

// hold makes the check of one invariant, if the level includes it. Without
// records only those of the database itself make sense.
func (c *checker) hold(inv layout.Invariant) {
	check, ok := checks[inv.ID]
	if !ok || !c.asked(inv.ID) {
		return
	}
	if c.rec == nil && !strings.HasPrefix(inv.ID, "M") {
		return
	}
	check(c, func(object, path, format string, args ...any) {
		if !c.isChosen(object) {
			return
		}
		finding := Finding{
			Invariant: inv.ID, Severity: inv.Severity, Object: object, Path: path,
			Detail: fmt.Sprintf(format, args...), Repair: inv.Repair,
		}
		if !utf8.ValidString(path) {
			finding.PathBytes = []byte(path)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.findings = append(c.findings, finding)
	})
}

// asked tells whether an invariant is to be checked.
func (c *checker) asked(id string) bool {
	inv, ok := layout.FindInvariant(id)
	return ok && slices.Index(levels, inv.Level) <= slices.Index(levels, c.opts.Level) || slices.Contains(c.opts.With, id)
}

// settle is how long operations under way get before the second look.
const settle = 100 * time.Millisecond

// again looks at the store a second time and keeps of the findings those that
// are seen both times: the others were of something that was changing. Deep
// checks are made again of the objects that failed only.
func (c *checker) again() error {
	select {
	case <-time.After(settle):
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
	second := &checker{ctx: c.ctx, opts: c.opts, state: c.state, mark: c.mark, limit: c.limit, only: map[string]bool{}}
	second.opts.Progress = nil
	second.state.Blob, second.state.Layer = "", ""
	second.hashes = c.hashes // what the first has not hashed is not said to be
	for _, f := range c.findings {
		second.only[f.Object] = true
	}
	if err := second.run(); err != nil {
		return err
	}
	c.findings = slices.DeleteFunc(c.findings, func(f Finding) bool {
		return !slices.ContainsFunc(second.findings, f.same)
	})
	return nil
}

func (c *checker) path(rel string) string { return filepath.Join(c.opts.Root, rel) }
