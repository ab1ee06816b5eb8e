package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	"varve.dev/api/varve"
	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/layout"
)

// fsckEvery is the time between two events of a check's progress.
const fsckEvery = 100 * time.Millisecond

// Fsck implements varve.Backend: the store is checked while it is in use. A
// database that is damaged is made anew before anything else is looked at:
// reading it through bbolt may end the process.
func (e *Engine) Fsck(ctx context.Context, req varve.FsckRequest, progress func(varve.Event)) (varve.FsckReport, error) {
	if err := e.db.Check(ctx); err != nil {
		return varve.FsckReport{}, err
	}
	options := fsck.Options{
		Root: e.root.Path("."), Level: layout.Level(req.Level), DB: e.db.ForCheck(), Boot: e.journal.Boot(),
	}
	if progress != nil {
		var mu sync.Mutex
		var last time.Time
		options.Progress = func(done, total int64) {
			mu.Lock()
			defer mu.Unlock()
			if now := time.Now(); now.Sub(last) > fsckEvery {
				last = now
				progress(varve.Event{ID: "fsck", Name: "store", Phase: varve.Checking, Current: done, Total: total})
			}
		}
	}
	report, err := fsck.Run(ctx, options)
	if err != nil {
		return varve.FsckReport{}, err
	}
	data, err := json.Marshal(report)
	if err != nil {
		return varve.FsckReport{}, fmt.Errorf("fsck: %w: %w", err, errdefs.ErrInternal)
	}
	var text strings.Builder
	report.WriteText(&text)
	return varve.FsckReport{Report: data, Text: text.String(), ExitCode: report.ExitCode()}, nil
}
