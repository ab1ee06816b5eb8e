package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"varve.dev/api/varve"
	"varve.dev/errdefs"
	"varve.dev/metadata"
)

// Keeper keeps a store open. When its database turns out damaged the store is
// closed and opened again, which makes the database anew; calls wait meanwhile.
// It implements varve.Backend.
type Keeper struct {
	options Options
	notice  func(line string)
	closing context.Context
	close   context.CancelFunc
	done    sync.WaitGroup
	failed  chan error

	mu      sync.Mutex
	term    *term         // nil: between two
	changed chan struct{} // closes when term or err changes
	err     error         // why there is no term, if not because it is coming
}

// term is one opening of the store.
type term struct {
	engine *Engine
	ctx    context.Context // of the calls
	end    context.CancelFunc
	calls  sync.WaitGroup
	// since and idle keep a finding that opening again does not confirm
	// from closing the store again and again.
	since time.Time
	idle  bool // opening it found nothing
}

const (
	// grace is how long calls go on in a store that is to be opened again,
	// and cutOff how long they get to end when they are told to.
	grace  = 2 * time.Second
	cutOff = 5 * time.Second
	// closeLimit is when a store that does not close is given up.
	closeLimit = 30 * time.Second
	// idleTerm is how long the store stays open after an opening that was
	// for nothing.
	idleTerm = time.Minute
	// maxRetry bounds the pause between tries to open the store.
	maxRetry = 30 * time.Second
)

// Keep opens a store as [Open] does. notice is told, line by line, of later
// openings; it may be nil.
func Keep(ctx context.Context, options Options, notice func(line string)) (*Keeper, error) {
	e, err := Open(ctx, options)
	if err != nil {
		return nil, err
	}
	if notice == nil {
		notice = func(string) {}
	}
	k := &Keeper{options: options, notice: notice, failed: make(chan error, 1), changed: make(chan struct{})}
	k.closing, k.close = context.WithCancel(context.Background())
	k.begin(e, false)
	k.done.Go(k.keep)
	if options.Scrub.Every > 0 {
		k.done.Go(func() { k.scrub(options.Scrub) })
	}
	return k, nil
}

// Failed returns a channel that gets an error if the store can neither be used
// nor opened again by this process.
func (k *Keeper) Failed() <-chan error { return k.failed }

// Close closes the store as [Engine.Close] does.
func (k *Keeper) Close(ctx context.Context) error {
	k.close()
	k.done.Wait()
	k.mu.Lock()
	t := k.term
	k.set(nil, errClosed)
	k.mu.Unlock()
	if t == nil {
		return nil
	}
	return t.engine.Close(ctx)
}

var errClosed = fmt.Errorf("the store is being closed: %w", errdefs.ErrUnavailable)

// set changes what calls find. Callers hold mu.
func (k *Keeper) set(t *term, err error) {
	k.term, k.err = t, err
	close(k.changed)
	k.changed = make(chan struct{})
}

func (k *Keeper) begin(e *Engine, idle bool) {
	t := &term{engine: e, since: time.Now(), idle: idle}
	t.ctx, t.end = context.WithCancel(context.Background())
	k.mu.Lock()
	defer k.mu.Unlock()
	k.set(t, nil)
}

// Rebuilt is [Engine.Rebuilt] of the present opening.
func (k *Keeper) Rebuilt() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.term == nil {
		return nil
	}
	return k.term.engine.Rebuilt()
}

// keep waits for damage and opens the store again.
func (k *Keeper) keep() {
	for {
		t := k.term // changed by this goroutine alone
		select {
		case <-t.engine.db.Damaged():
		case <-k.closing.Done():
			return
		}
		if t.idle && !k.sleep(time.Until(t.since.Add(idleTerm))) {
			return
		}
		if !t.damaged() {
			k.notice(fmt.Sprintf("the database is damaged (%s), and a sync has failed: the store has to be opened by another process", t.damage()))
			return
		}
		if !k.reopen(t) {
			return
		}
	}
}

// damaged tells whether the store is to be opened again. After a failed sync it
// must not be: what was not written may still look written.
func (t *term) damaged() bool {
	cause := t.engine.root.PoisonCause()
	return t.engine.db.Damage() != nil &&
		(cause == nil || errors.Is(cause, varve.ErrReopened) || errdefs.AsCorrupt(cause) != nil)
}

// ending tells whether a term takes no more calls, though nobody may have ended
// it yet.
func (t *term) ending() bool { return t.damaged() && !t.idle }

// reopen ends a term and begins the next; false if that is not to be.
func (k *Keeper) reopen(t *term) bool {
	k.notice(fmt.Sprintf("the database is damaged (%s); the store is being opened again", t.damage()))
	k.mu.Lock()
	k.set(nil, nil)
	k.mu.Unlock()
	if err := t.finish(); err != nil {
		k.mu.Lock()
		k.set(nil, err)
		k.mu.Unlock()
		k.failed <- err
		return false
	}
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, maxRetry) {
		e, err := Open(k.closing, k.options)
		if err == nil {
			for _, line := range append(e.Rebuilt(), "the store is open again") {
				k.notice(line)
			}
			k.begin(e, e.Rebuilt() == nil)
			return true
		}
		// Locked: a command was faster, and is making it anew.
		if !errors.Is(err, metadata.ErrLocked) {
			k.notice(fmt.Sprintf("the store cannot be opened again: %v", err))
			k.mu.Lock()
			k.set(nil, fmt.Errorf("the store could not be opened again: %w", err))
			k.mu.Unlock()
		}
		if !k.sleep(pause) {
			return false
		}
	}
}

func (t *term) damage() string { return firstLine(t.engine.db.Damage()) }

// firstLine leaves out the stack that comes with damage.
func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// finish ends the calls of a term and closes its store. An error says that the
// lock on the database is still this process's.
func (t *term) finish() error {
	t.wait(grace)
	t.end()
	t.wait(cutOff)
	// Whoever is still there changes nothing any more.
	t.engine.root.Poison(varve.ErrReopened)
	closed := make(chan struct{})
	go func() {
		_ = t.engine.closeParts() // it is damaged
		close(closed)
	}()
	select {
	case <-closed:
		return nil
	case <-time.After(closeLimit):
		return fmt.Errorf("the store, whose database is damaged, does not close: %w", errdefs.ErrUnavailable)
	}
}

// wait waits for the calls of a term, no longer than d.
func (t *term) wait(d time.Duration) {
	ended := make(chan struct{})
	go func() {
		t.calls.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(d):
	}
}

// sleep returns false if the store is to be closed.
func (k *Keeper) sleep(d time.Duration) bool {
	select {
	case <-k.closing.Done():
		return false
	case <-time.After(d):
		return true
	}
}
