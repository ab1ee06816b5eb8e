package daemon

import (
	"context"
	"errors"
	"time"

	"varve.dev/api/varve"
	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// checkKind tells the checks that people ask for from the daemon's own: of each
// kind, one that was cut off is remembered.
type checkKind string

const (
	asked      checkKind = layout.CheckingKey
	background checkKind = layout.ScrubbingKey
)

// check looks at the store while it is in use. A database that is damaged is
// made anew before anything else is looked at: reading it through bbolt may end
// the process.
func (e *Engine) check(ctx context.Context, opts fsck.Options, kind checkKind, resume bool) (*fsck.Report, error) {
	if err := e.db.Check(ctx); err != nil {
		return nil, err
	}
	opts.Root, opts.DB, opts.Boot = e.root.Path("."), e.db.ForCheck(), e.journal.Boot()
	if resume && opts.Level == layout.Deep {
		cut, err := e.checked(ctx, string(kind))
		if err != nil {
			return nil, err
		}
		if cut != nil {
			opts.Resume, opts.Of, opts.Sample = cut, nil, 0
		}
	}
	opts.Mark = func(at layout.CheckRecord) {
		at.Background = kind == background
		e.note(ctx, func(tx *metadata.Tx) error { return tx.Checks().Put(string(kind), at) })
	}
	report, err := fsck.Run(ctx, opts)
	if err == nil && opts.Level == layout.Deep {
		e.note(ctx, func(tx *metadata.Tx) error {
			rec := report.Record()
			rec.Background = kind == background
			if len(rec.Of) == 0 && rec.Sample == 0 {
				return errors.Join(tx.Checks().Delete(string(kind)), tx.Checks().Put(layout.CheckedKey, rec))
			}
			// One of more may be what was cut off.
			cut, err := tx.Checks().Get(string(kind))
			if err == nil && cut.Started.Equal(rec.Started) {
				err = tx.Checks().Delete(string(kind))
			}
			return err
		})
	}
	return report, err
}

// noteTimeout bounds what a check waits for a store that does not write.
const noteTimeout = 10 * time.Second

// note writes down where a check is. That it cannot is no reason for the check
// to fail: it may be of a store that is full, or whose disk does not write.
func (e *Engine) note(ctx context.Context, fn func(*metadata.Tx) error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), noteTimeout)
	defer cancel()
	_ = e.db.Update(ctx, fn)
}

// checked returns what is kept of a check; nil if nothing is.
func (e *Engine) checked(ctx context.Context, key string) (rec *layout.CheckRecord, err error) {
	err = e.db.View(ctx, func(tx *metadata.Tx) error {
		r, err := tx.Checks().Get(key)
		if errors.Is(err, errdefs.ErrNotFound) {
			return nil
		}
		rec = &r
		return err
	})
	return rec, err
}

// tellChecks describes what is kept of checks.
func (e *Engine) tellChecks(ctx context.Context, info *varve.Info) error {
	for _, key := range []string{layout.CheckedKey, layout.CheckingKey, layout.ScrubbingKey} {
		rec, err := e.checked(ctx, key)
		if err != nil {
			return err
		}
		if rec == nil {
			continue
		}
		c := varve.Check{
			Started: rec.Started, Finished: rec.Finished, Of: rec.Of, Sample: rec.Sample, Background: rec.Background,
			Bytes: rec.Bytes, Findings: rec.Findings, Losses: rec.Losses, Healed: rec.Healed,
		}
		if key == layout.CheckedKey {
			info.Checked = &c
		} else {
			info.Checking = append(info.Checking, c)
		}
	}
	return nil
}
