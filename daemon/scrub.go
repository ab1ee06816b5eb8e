package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"varve.dev/fsck"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/repair"
)

// Scrub says when a daemon reads the whole store by itself, and how fast.
type Scrub struct {
	// Every is the time from the end of one deep check, whoever asked for it,
	// to the beginning of the next; 0: never.
	Every time.Duration
	// Rate is in bytes a second; 0: no limit.
	Rate int64
	// Repair has what is found made whole, from the store itself and the
	// registries that it came from.
	Repair bool
}

// The usual values of Scrub.Every. One that goes on and on rests, so that the
// check of a small store does not use up a processor.
const (
	ScrubWeekly       = 7 * 24 * time.Hour
	ScrubContinuously = time.Minute
)

// scrubRetry is the pause after a check that could not be made.
const scrubRetry = 10 * time.Minute

// scrub checks the store from time to time until it is closed. A check that is
// cut off by that goes on with the next opening.
func (k *Keeper) scrub(s Scrub) {
	for {
		due, err := call(k.closing, k, func(ctx context.Context, e *Engine) (time.Time, error) { return e.scrubDue(ctx, s.Every) })
		if err == nil && !time.Now().Before(due) {
			err = do(k.closing, k, func(ctx context.Context, e *Engine) error { return e.scrub(ctx, s, k.notice) })
			due = time.Now().Add(s.Every)
		}
		pause := min(time.Until(due), time.Hour) // the clock may be set
		if err != nil {
			pause = scrubRetry
		}
		switch {
		case k.closing.Err() != nil, errors.Is(err, errClosed):
			return
		case err != nil && !errors.Is(err, context.Canceled): // by the end of a term
			k.notice(fmt.Sprintf("the check in the background could not be made: %v", err))
		}
		if !k.sleep(pause) {
			return
		}
	}
}

// scrubDue is when the next check begins: at once if one was cut off.
func (e *Engine) scrubDue(ctx context.Context, every time.Duration) (time.Time, error) {
	if cut, err := e.checked(ctx, layout.ScrubbingKey); cut != nil || err != nil {
		return time.Time{}, err
	}
	last, err := e.checked(ctx, layout.CheckedKey)
	if err != nil {
		return time.Time{}, err
	}
	if last != nil {
		return last.Finished.Add(every), nil
	}
	return e.db.Meta().Created.Add(every), nil
}

// scrub makes one check, and says what it finds.
func (e *Engine) scrub(ctx context.Context, s Scrub, notice func(string)) error {
	report, err := e.check(ctx, fsck.Options{Level: layout.Deep, Rate: s.Rate}, background, true)
	if err != nil {
		return err
	}
	for _, f := range report.Findings {
		if f.Severity != layout.Notice {
			notice(fmt.Sprintf("check in the background: %s %s: %s %s: %s", f.Invariant, f.Severity, f.Object, f.Path, f.Detail))
		}
	}
	if !s.Repair || report.ExitCode() == 0 {
		return nil
	}
	plan, err := e.repairer.Plan(ctx, report, repositories{})
	if err != nil {
		return err
	}
	healed := 0
	err = e.repairer.Run(ctx, plan, func(step *repair.Step) {
		if step.Done.Healed {
			healed += len(step.Findings)
			notice(fmt.Sprintf("check in the background: %s is healed", step.Object))
			return
		}
		notice(fmt.Sprintf("check in the background: %s could not be healed: %s", step.Object, step.Done.Error))
	})
	e.note(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Checks().Get(layout.CheckedKey)
		if err != nil {
			return err
		}
		rec.Healed = healed
		return tx.Checks().Put(layout.CheckedKey, rec)
	})
	return err
}
