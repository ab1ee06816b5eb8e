package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/api/varve"
	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/image"
	"varve.dev/layout"
	"varve.dev/repair"
)

// fsckEvery is the time between two events of a check's progress.
const fsckEvery = 100 * time.Millisecond

// Fsck implements [varve.Backend].
func (e *Engine) Fsck(ctx context.Context, req varve.FsckRequest, progress func(varve.Event)) (varve.FsckReport, error) {
	opts := fsck.Options{
		Level: layout.Level(req.Level), Of: req.Of, Sample: req.Sample, Rate: req.Rate, Progress: slowly(progress),
	}
	report, err := e.check(ctx, opts, asked, req.Resume)
	if err != nil {
		return varve.FsckReport{}, err
	}
	var plan *repair.Plan
	if req.Plan || req.Repair {
		if plan, err = e.repairer.Plan(ctx, report, repositories{req.Registry}); err != nil {
			return varve.FsckReport{}, err
		}
	}
	if req.Repair && len(plan.Steps) > 0 {
		if err := e.repairer.Run(ctx, plan, forwardRepairs(progress)); err != nil {
			return varve.FsckReport{}, err
		}
		opts.Of, opts.Sample, opts.Draw = report.Of, report.Sample, report.Draw // the same again
		if report, err = e.check(ctx, opts, asked, false); err != nil {
			return varve.FsckReport{}, err
		}
		plan.Checked(report)
	}
	if e.looked == nil {
		return reportOf(report, plan, report.ExitCode())
	}
	report.AddLost(e.lost())
	code := report.ExitCode()
	report.AddBefore(e.looked)
	if !req.Repair { // what opening has healed is as good as repaired
		code = report.ExitCode()
	}
	return reportOf(report, plan, code)
}

func reportOf(report *fsck.Report, plan *repair.Plan, code int) (out varve.FsckReport, err error) {
	var text strings.Builder
	if out.Report, err = json.Marshal(report); err == nil && plan != nil {
		plan.WriteText(&text)
		out.Plan, err = json.Marshal(plan)
	}
	if err != nil {
		return varve.FsckReport{}, fmt.Errorf("fsck: %w: %w", err, errdefs.ErrInternal)
	}
	report.WriteText(&text)
	out.Text, out.ExitCode = text.String(), code
	return out, nil
}

func forwardRepairs(progress func(varve.Event)) func(*repair.Step) {
	if progress == nil {
		return nil
	}
	return func(s *repair.Step) {
		phase := varve.Done
		if !s.Done.Healed {
			phase = varve.Failed
		}
		progress(varve.Event{ID: s.Object, Name: s.Object, Phase: phase, Text: s.Done.Error})
	}
}

// repositories are those that blobs came from, as a request says they are to be
// talked to.
type repositories struct{ asked varve.Registry }

// Open implements repair.Registries.
func (r repositories) Open(ctx context.Context, repository string, desc ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	ref, err := image.ParseRef(repository + "@" + desc.Digest.String())
	if err != nil {
		return nil, err
	}
	options := remoteOptions(r.asked, ref)
	// Several may have the blob, and somebody may wait for what needs it.
	options.Patience = image.DefaultPatience()
	options.Patience.Attempts = 3
	repo, err := image.NewRemotes(options).Repository(ctx, ref)
	if err != nil {
		return nil, err
	}
	return repo.Open(ctx, desc, offset), nil
}

// look checks what opening a store may change, in seconds at most. A store that
// cannot be looked at cannot be opened either, and that is said then.
func look(ctx context.Context, root string) *fsck.Report {
	report, err := fsck.Run(ctx, fsck.Options{Root: root, Level: layout.Quick, With: []string{"M4"}})
	if err != nil {
		return nil
	}
	return report
}

// CheckClosed checks a store that cannot be opened, from the beginning. Errors
// as fsck.Run.
func CheckClosed(ctx context.Context, root string, req varve.FsckRequest, progress func(varve.Event)) (varve.FsckReport, error) {
	report, err := fsck.Run(ctx, fsck.Options{
		Root: root, Level: layout.Level(req.Level), Of: req.Of, Sample: req.Sample, Rate: req.Rate, Progress: slowly(progress),
	})
	if err != nil {
		return varve.FsckReport{}, err
	}
	return reportOf(report, nil, report.ExitCode())
}

// slowly makes an event of a check's progress from time to time.
func slowly(progress func(varve.Event)) func(done, total int64) {
	if progress == nil {
		return nil
	}
	var mu sync.Mutex
	var last time.Time
	return func(done, total int64) {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); now.Sub(last) > fsckEvery {
			last = now
			progress(varve.Event{ID: "fsck", Name: "store", Phase: varve.Checking, Current: done, Total: total})
		}
	}
}
