package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/time/rate"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// Journal belongs to one open store.
type Journal struct {
	root *durable.Root
	db   *metadata.DB
	boot string

	kick    chan struct{} // capacity 1: there is something to sweep
	stop    context.CancelFunc
	stopped sync.WaitGroup

	pace      *rate.Limiter // of the deleting
	finishing chan struct{} // capacity 1: pending intents are being carried out

	mu       sync.Mutex // guards the rest
	pending  map[layout.IntentID]layout.IntentRecord
	trashed  map[string]bool // claimed sweeps whose files are in the trash: their names are free
	moved    chan struct{}   // closed and replaced when files were moved there, or a round has ended
	hurried  int             // who waits for the space that deleting gives back
	swept    chan struct{}   // closed and replaced after each round of the sweeper
	idle     bool            // the last round found nothing to do
	sweepErr error           // of the last round
}

// Create makes the directories of a store in root that are not there yet.
// It may be interrupted and run again. Errors: Corrupt (R2) for something else
// in a directory's place: what is renamed into a directory that a link leads
// to, elsewhere, is neither durable nor there for the witness.
func Create(root *durable.Root) error {
	var made []string
	for _, d := range layout.Dirs() {
		if fi, err := os.Lstat(root.Path(d.Path)); err == nil {
			if !fi.IsDir() {
				return &errdefs.Corrupt{Invariant: "R2", Object: "store " + root.Path("."), Detail: fmt.Sprintf("%s is no directory but %v", d.Path, fi.Mode().Type())}
			}
			continue
		}
		err := root.Mkdir(d.Path, os.FileMode(d.Perm))
		if err != nil && !errors.Is(err, errdefs.ErrAlreadyExists) {
			return fmt.Errorf("create store: %w", err)
		}
		made = append(made, parent(d.Path))
	}
	if len(made) == 0 {
		return nil
	}
	if err := root.SyncNames(unique(made)...); err != nil {
		return fmt.Errorf("create store: %w", err)
	}
	durable.At(layout.PointCreateDirs)
	return nil
}

// Open recovers the store from whatever its last owner left and starts the
// sweeper. It returns what it found. The caller owns root and db and closes
// them after the journal.
func Open(ctx context.Context, root *durable.Root, db *metadata.DB) (*Journal, Recovery, error) {
	boot, err := bootID()
	if err != nil {
		return nil, Recovery{}, err
	}
	j := &Journal{
		root: root, db: db, boot: boot, kick: make(chan struct{}, 1), swept: make(chan struct{}),
		pace: rate.NewLimiter(deleteRate, deleteOnce), finishing: make(chan struct{}, 1), pending: map[layout.IntentID]layout.IntentRecord{},
		trashed: map[string]bool{}, moved: make(chan struct{}),
	}
	found, err := j.recover(ctx)
	if err != nil {
		return nil, found, fmt.Errorf("recover store %s: %w", root.Path("."), err)
	}
	sweepCtx, cancel := context.WithCancel(context.Background())
	j.stop = cancel
	j.stopped.Add(1)
	go j.sweepLoop(sweepCtx)
	j.Kick()
	return j, found, nil
}

// Close stops the sweeper after its current step. What it has not done is
// done by the next owner; see [Journal.Drain]. The staging folder of this
// boot goes if it is empty.
func (j *Journal) Close() error {
	j.stop()
	j.stopped.Wait()
	if j.root.Poisoned() != nil {
		return nil // recovery of the next owner sees to it
	}
	if entries, err := os.ReadDir(j.root.Path(j.stagingDir())); err == nil && len(entries) == 0 {
		return j.root.Remove(j.stagingDir())
	}
	return nil
}

// NewStaging returns the name of a new place in staging, made as an empty
// directory, and the id that a layer unpacked there will have.
func (j *Journal) NewStaging() (layout.LayerID, string, error) {
	id := layout.LayerID(layout.NewID())
	rel := layout.StagingPath(j.boot, id)
	err := j.root.Mkdir(rel, 0o711)
	if errors.Is(err, errdefs.ErrNotFound) {
		// The first of this boot. Not made when the store is opened: a full
		// disk has no room for it, and a removal needs none. Its name becomes
		// durable with what is in it.
		if err = j.root.Mkdir(j.stagingDir(), 0o700); err == nil || errors.Is(err, errdefs.ErrAlreadyExists) {
			err = j.root.Mkdir(rel, 0o711)
		}
	}
	if err != nil {
		return "", "", fmt.Errorf("staging: %w", err)
	}
	return id, rel, nil
}

// Discard takes a place in staging away that was not published. Errors are
// left to recovery, which removes it too.
func (j *Journal) Discard(rel string) {
	_ = j.root.RemoveAll(rel)
}

func (j *Journal) stagingDir() string { return layout.StagingDir + "/" + j.boot }

// bootID names this boot of the kernel, so that what another boot left in
// staging is told from what is being unpacked now.
func bootID() (string, error) {
	const path = "/proc/sys/kernel/random/boot_id"
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("boot id: %w: %w", err, errdefs.ErrUnavailable)
	}
	return strings.TrimSpace(string(data)), nil
}

// Boot returns the id of this boot, which names the staging folder in use.
func (j *Journal) Boot() string { return j.boot }
