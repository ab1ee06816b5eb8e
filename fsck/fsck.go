package fsck

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Options for [Run].
type Options struct {
	Root  string       // the store's directory
	Level layout.Level // empty: Normal
	// DB is the open database of a store that is in use; nil opens the file
	// read-only, which needs the store to be closed.
	DB *bolt.DB
	// Boot is the id of the running boot, whose staging folder belongs to
	// operations under way. Only with DB.
	Boot    string
	Workers int // for deep checks; 0 means 2
	// Progress is told of bytes read and to read. May be nil.
	Progress func(done, total int64)
}

// Finding is one broken invariant on one object.
type Finding struct {
	Invariant string          `json:"invariant"` // number in package layout
	Severity  layout.Severity `json:"severity"`
	Object    string          `json:"object"`         // "layer 0123…", "blob sha256:…"
	Path      string          `json:"path,omitempty"` // in the store, or in the layer's tree
	Detail    string          `json:"detail"`         // what is there instead
	Repair    string          `json:"repair"`         // what would make it hold again
}

// Report is what a check found. Its JSON is stable: fields are only added.
type Report struct {
	Root     string       `json:"root"`
	Level    layout.Level `json:"level"`
	Findings []Finding    `json:"findings"`
	Blobs    int          `json:"blobs"`  // looked at
	Layers   int          `json:"layers"` // looked at
	Files    int64        `json:"files"`  // of layers, compared with their manifests (deep)
	Bytes    int64        `json:"bytes"`  // read and hashed (deep)
	Started  time.Time    `json:"started"`
	Finished time.Time    `json:"finished"`
}

// ExitCode is 0 for a clean store, 1 if everything found can be repaired from
// what is there, 2 if something acknowledged is lost or wrong. Notices do not
// count. 3, for a check that could not run, is the caller's.
func (r *Report) ExitCode() int {
	code := 0
	for _, f := range r.Findings {
		switch f.Severity {
		case layout.Loss:
			return 2
		case layout.Damage, layout.Leak:
			code = 1
		}
	}
	return code
}

// WriteText writes the report for people, the summary last.
func (r *Report) WriteText(w io.Writer) {
	for _, f := range r.Findings {
		at := ""
		if f.Path != "" {
			at = " at " + f.Path
		}
		fmt.Fprintf(w, "%s %s: %s%s: %s\n    repair: %s\n", f.Invariant, f.Severity, f.Object, at, f.Detail, f.Repair)
	}
	verdict := "clean"
	if n := len(r.Findings); n > 0 {
		verdict = fmt.Sprintf("%d findings", n)
	}
	fmt.Fprintf(w, "fsck %s: %s: %d blobs, %d layers", r.Level, verdict, r.Blobs, r.Layers)
	if r.Level == layout.Deep {
		fmt.Fprintf(w, ", %d files, %d bytes read", r.Files, r.Bytes)
	}
	fmt.Fprintf(w, ", %.1fs\n", r.Finished.Sub(r.Started).Seconds())
}

// Run checks a store. An error means that the check could not take place:
// ErrNotFound for no store, ErrUnavailable for one that is open elsewhere,
// ErrFailedPrecondition for a format that is not known.
func Run(ctx context.Context, opts Options) (*Report, error) {
	if opts.Level == "" {
		opts.Level = layout.Normal
	}
	if opts.Workers <= 0 {
		opts.Workers = 2
	}
	if !slices.Contains([]layout.Level{layout.Quick, layout.Normal, layout.Deep}, opts.Level) {
		return nil, fmt.Errorf("fsck level %q is not quick, normal or deep: %w", opts.Level, errdefs.ErrInvalidArgument)
	}
	c := &check{ctx: ctx, opts: opts, report: &Report{Root: opts.Root, Level: opts.Level, Findings: []Finding{}, Started: time.Now().UTC()}}
	if err := c.run(); err != nil {
		return nil, fmt.Errorf("fsck %s: %w", opts.Root, err)
	}
	slices.SortStableFunc(c.report.Findings, func(a, b Finding) int {
		return strings.Compare(a.Invariant+a.Object+a.Path, b.Invariant+b.Object+b.Path)
	})
	c.report.Finished = time.Now().UTC()
	return c.report, ctx.Err()
}

// check is one Run.
type check struct {
	ctx  context.Context
	opts Options
	rec  *records
	dirs dirs

	mu     sync.Mutex // guards report
	report *Report
}

func (c *check) run() error {
	if fi, err := os.Stat(c.opts.Root); err != nil || !fi.IsDir() {
		return fmt.Errorf("no store is there: %w", errdefs.ErrNotFound)
	}
	online := c.opts.DB != nil
	// Directories first: what is recorded afterwards is then never missing
	// from the listing for being new, and what is listed and not recorded is
	// looked at again.
	var err error
	if c.dirs, err = c.list(); err != nil {
		return err
	}
	if c.rec, err = c.load(); err != nil || c.rec == nil {
		return err
	}
	c.checks()
	if !online || len(c.report.Findings) == 0 || c.ctx.Err() != nil {
		return nil
	}
	return c.again()
}

func (c *check) checks() {
	c.databaseChecks()
	c.fileChecks()
	if c.opts.Level == layout.Quick {
		c.edgeChecks()
		return
	}
	c.edgeChecks()
	c.referenceChecks()
	c.manifestChecks()
	if c.opts.Level == layout.Deep {
		c.deepChecks()
	}
}

// again looks a second time, without the deep part, and keeps of the cheap
// findings those that are seen both times: the others were of something that
// was changing.
func (c *check) again() error {
	first := c.report.Findings
	c.report.Findings = nil
	level := c.opts.Level
	if level == layout.Deep {
		c.opts.Level = layout.Normal
	}
	defer func() { c.opts.Level = level }()
	var err error
	if c.dirs, err = c.list(); err != nil {
		return err
	}
	if c.rec, err = c.load(); err != nil || c.rec == nil {
		return err
	}
	blobs, layers := c.report.Blobs, c.report.Layers
	c.checks()
	c.report.Blobs, c.report.Layers = blobs, layers
	second := c.report.Findings
	c.report.Findings = []Finding{}
	for _, f := range first {
		same := func(g Finding) bool {
			return f.Invariant == g.Invariant && f.Object == g.Object && f.Path == g.Path
		}
		if slices.ContainsFunc(second, same) || deepOnly(f.Invariant) && c.stillRecorded(f.Object) {
			c.report.Findings = append(c.report.Findings, f)
		}
	}
	return nil
}

func deepOnly(id string) bool {
	inv, _ := layout.FindInvariant(id)
	return inv.Level == layout.Deep
}

// stillRecorded tells whether a blob or layer was not removed meanwhile.
func (c *check) stillRecorded(object string) bool {
	kind, id, _ := strings.Cut(object, " ")
	switch kind {
	case "blob":
		_, ok := c.rec.blobs[layout.BlobDigest(id)]
		return ok
	case "layer":
		_, ok := c.rec.layers[layout.LayerID(id)]
		return ok
	}
	return true
}

// found reports a broken invariant.
func (c *check) found(id, object, path, format string, args ...any) {
	inv, ok := layout.FindInvariant(id)
	if !ok {
		panic("fsck: no invariant " + id)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Findings = append(c.report.Findings, Finding{
		Invariant: id, Severity: inv.Severity, Object: object, Path: path,
		Detail: fmt.Sprintf(format, args...), Repair: inv.Repair,
	})
}

func (c *check) path(rel string) string { return filepath.Join(c.opts.Root, rel) }
