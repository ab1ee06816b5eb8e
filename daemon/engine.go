package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/api/varve"
	"varve.dev/builder"
	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/gc"
	"varve.dev/image"
	"varve.dev/internal/version"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/repair"
	"varve.dev/runtime"
	"varve.dev/runtime/containers"
	"varve.dev/snapshotter"
)

// Options for [Open].
type Options struct {
	Root     string // the store's directory, made if it is not there
	State    string // for sockets
	Embedded bool   // in a command, not in a daemon
	// Look has the closed store looked at before it is opened, which may
	// make good what [Engine.Fsck] is to tell of.
	Look bool
	// Limits are what the store may take.
	Limits gc.Limits
	// Scrub is what a [Keeper] checks by itself.
	Scrub Scrub
	// Registry says how builds talk to registries, unless their clients do.
	Registry varve.Registry
	// Entitlements and BuildLabels are those of the builder: what a build may
	// be granted, and what clients are told of it.
	Entitlements []string
	CDIDirs      []string // of CDI specifications; nil: /etc/cdi, /var/run/cdi
	BuildLabels  map[string]string
	// ProvenanceEnv is told in the provenance of builds.
	ProvenanceEnv map[string]any
	// Opened is told of the store's parts when it is open. For tests that
	// watch what a store does to its disk; may be nil.
	Opened func(*durable.Root, *metadata.DB)
}

// Engine is an open store with everything that works on it. It implements
// varve.Backend.
type Engine struct {
	options    Options
	root       *durable.Root
	db         *metadata.DB
	journal    *journal.Journal
	blobs      *content.Store
	snaps      *snapshotter.Snapshotter
	images     *image.Store
	containers *containers.Store
	builder    *builder.Builder
	repairer   *repair.Repairer
	collector  *gc.Collector
	scratch    *scratch
	found      journal.Recovery
	looked     *fsck.Report // before the opening; nil without Options.Look
}

var _ varve.Backend = (*Engine)(nil)

// rootPerm lets nobody but root list a store; containers reach their trees
// through mounts.
const rootPerm = 0o711

// Open opens the store at options.Root, makes it if it is not there, and
// recovers it. Errors: metadata.ErrLocked; ErrFailedPrecondition for a format
// that is not known; Corrupt; ErrUnavailable.
func Open(ctx context.Context, options Options) (*Engine, error) {
	root, err := durable.Create(options.Root, rootPerm)
	if err != nil {
		return nil, err
	}
	e := &Engine{options: options, root: root}
	if options.Look {
		e.looked = look(ctx, root.Path("."))
	}
	if err := e.open(ctx); err != nil {
		return nil, errors.Join(err, e.closeParts())
	}
	return e, nil
}

func (e *Engine) open(ctx context.Context) (err error) {
	if err = e.options.Limits.Check(); err != nil {
		return err
	}
	if err = journal.Create(e.root); err != nil {
		return err
	}
	if e.db, err = metadata.Open(e.root, metadata.Options{Rebuild: true}); err != nil {
		return err
	}
	if e.journal, e.found, err = journal.Open(ctx, e.root, e.db); err != nil {
		return err
	}
	e.blobs = content.New(e.root, e.db, e.journal)
	e.snaps = snapshotter.New(e.root, e.db, e.journal, e.blobs)
	e.collector = gc.New(gc.Config{
		Root: e.root, DB: e.db, Journal: e.journal, Blobs: e.blobs, Limits: e.options.Limits, Background: !e.options.Embedded,
	})
	e.blobs.Within(e.collector.Space())
	e.snaps.Within(e.collector.Space())
	e.containers = containers.New(e.root, e.db, e.journal, e.snaps)
	e.images = image.New(image.Config{
		Root: e.root, DB: e.db, Journal: e.journal, Blobs: e.blobs,
		Unpacker: unpacker{e.snaps}, Space: e.collector.Space(), Remotes: image.NewRemotes(image.RemoteOptions{Credentials: image.DockerCredentials("")}),
	})
	e.repairer = repair.New(repair.Config{Root: e.root, DB: e.db, Journal: e.journal, Blobs: e.blobs, Snaps: e.snaps})
	if e.scratch, err = newScratch(e.options.State); err != nil {
		return err
	}
	if e.options.Opened != nil {
		e.options.Opened(e.root, e.db)
	}
	e.builder = builder.New(builder.Config{
		Root: e.root, DB: e.db, Journal: e.journal, Blobs: e.blobs, Snaps: e.snaps, Shim: runtime.FindShim, Scratch: e.scratch.dir,
		Space: e.collector, Entitlements: e.options.Entitlements, CDIDirs: e.options.CDIDirs, ProvenanceEnv: e.options.ProvenanceEnv,
	})
	return nil
}

// unpacker hands snapshotter's Unpack on as the interface that image declares.
type unpacker struct{ snaps *snapshotter.Snapshotter }

func (u unpacker) Begin(ctx context.Context, lease *metadata.Lease, chain []layout.DiffID, barrier *durable.Barrier) (image.Unpack, error) {
	return u.snaps.Begin(ctx, lease, chain, barrier)
}

// embeddedDrain is how long a command that has the store open by itself deletes
// before it ends. The next one goes on; `varve gc` does until all is gone.
const embeddedDrain = time.Second

// Close deletes what was removed, as long as ctx allows, and closes the store.
// The next owner goes on where it was cut off.
func (e *Engine) Close(ctx context.Context) error {
	if e.options.Embedded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, embeddedDrain)
		defer cancel()
		defer e.journal.Hurry()()
	}
	if err := e.journal.Drain(ctx); err != nil && ctx.Err() == nil {
		return errors.Join(err, e.closeParts())
	}
	return e.closeParts()
}

// closeParts closes what is open, from the top down.
func (e *Engine) closeParts() error {
	var all []error
	if e.scratch != nil {
		all = append(all, e.scratch.Close())
	}
	if e.collector != nil {
		e.collector.Close()
	}
	if e.journal != nil {
		all = append(all, e.journal.Close())
	}
	if e.db != nil {
		all = append(all, e.db.Close())
	}
	return errors.Join(append(all, e.root.Close())...)
}

// Rebuilt says what became of the database if it was lost or damaged and this
// opening made it again; nothing if not.
func (e *Engine) Rebuilt() []string {
	if rec := e.db.Rebuilt(); rec != nil {
		return e.tellRebuilt(*rec)
	}
	return nil
}

// lost is what the database had that this opening made again, and has no more.
func (e *Engine) lost() []string {
	if rec := e.db.Rebuilt(); rec != nil {
		return rec.Lost
	}
	return nil
}

// tellRebuilt leaves out of what was kept the files that are gone by now.
func (e *Engine) tellRebuilt(rec layout.RebuiltRecord) []string {
	why, _, _ := strings.Cut(rec.Why, "\n") // a stack may follow
	lines := []string{fmt.Sprintf("the database was rebuilt on %s (%s): %d records", rec.When.Format(time.DateTime), why, rec.Records)}
	for _, l := range rec.Lost {
		lines = append(lines, "lost: "+l)
	}
	for _, k := range rec.Kept {
		if _, err := os.Lstat(e.root.Path(k)); err == nil || strings.HasPrefix(k, "image ") {
			lines = append(lines, "kept: "+k)
		}
	}
	return lines
}

// Root implements varve.Backend.
func (e *Engine) Root(context.Context) (string, error) { return e.root.Path("."), nil }

// Info implements varve.Backend.
func (e *Engine) Info(ctx context.Context) (varve.Info, error) {
	info := varve.Info{
		Version: version.Version, Root: e.root.Path("."), StoreID: e.db.Meta().ID, Format: e.db.Meta().Format,
		Embedded: e.options.Embedded, PID: unix.Getpid(), FileSys: e.root.FileSystem(),
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err == nil {
		info.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var rebuilt layout.RebuiltRecord // by whichever opening
	err := e.db.View(ctx, func(tx *metadata.Tx) (err error) {
		all, err := tx.Accounts()
		if err != nil {
			return err
		}
		info.Images, info.Layers, info.Blobs = int(all[layout.AccountImages].Count), int(all[layout.AccountLayers].Count), int(all[layout.AccountBlobs].Count)
		if rebuilt, err = tx.Rebuilt(); errors.Is(err, errdefs.ErrNotFound) {
			return nil
		}
		return err
	})
	if !rebuilt.When.IsZero() {
		info.Recovered = e.tellRebuilt(rebuilt)
	}
	info.Recovered = append(info.Recovered, e.tellFound(rebuilt.Kept)...)
	err = errors.Join(err, e.tellChecks(ctx, &info))
	return info, err
}

// tellFound says what recovery found, but for what is known to be kept.
func (e *Engine) tellFound(kept []string) (lines []string) {
	for _, purpose := range e.found.Finished {
		lines = append(lines, "finished: "+purpose)
	}
	for _, why := range e.found.GivenUp {
		lines = append(lines, "given up: "+why)
	}
	for _, dir := range e.found.Adopted {
		if !slices.Contains(kept, dir) {
			lines = append(lines, "kept, though nothing names it: "+dir)
		}
	}
	for _, dir := range e.found.Stranded {
		lines = append(lines, "stands only in staging (G2): "+dir)
	}
	if e.found.Discarded > 0 {
		lines = append(lines, fmt.Sprintf("discarded %d unfinished trees", e.found.Discarded))
	}
	return lines
}
