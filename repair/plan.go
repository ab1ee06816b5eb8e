package repair

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/fsck"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/snapshotter"
)

// Config is what a Repairer stands on.
type Config struct {
	Root    *durable.Root
	DB      *metadata.DB
	Journal *journal.Journal
	Blobs   *content.Store
	Snaps   *snapshotter.Snapshotter
}

// Registries brings blobs again from where they came from. nil: nothing is
// fetched.
type Registries interface {
	// Open returns a blob's bytes from offset on. repository is "host/name".
	Open(ctx context.Context, repository string, desc ocispec.Descriptor, offset int64) (io.ReadCloser, error)
}

// Repairer repairs one open store.
type Repairer struct {
	Config
	one sync.Mutex // one repair at a time
}

// New returns a repairer of the store that c belongs to.
func New(c Config) *Repairer { return &Repairer{Config: c} }

// Plan is what a repair would do, in order.
type Plan struct {
	Steps []*Step `json:"steps"`
	// Left are findings that no repair is for: notices, and what only a user
	// can decide.
	Left []fsck.Finding `json:"left,omitempty"`
}

// Step makes one object whole.
type Step struct {
	Object   string         `json:"object"`
	Findings []fsck.Finding `json:"findings"`
	Does     string         `json:"does"`            // what, in words
	From     []string       `json:"from,omitempty"`  // where from, in the order in which it is tried
	Fetch    int64          `json:"fetch,omitempty"` // bytes that it fetches at most
	// Done is what came of it; nil before.
	Done *Outcome `json:"done,omitempty"`

	order int
	run   func(context.Context, *Outcome) error
}

// Outcome is what came of a step.
type Outcome struct {
	Healed     bool   `json:"healed"`
	From       string `json:"from,omitempty"`       // where it was healed from
	Fetched    int64  `json:"fetched,omitempty"`    // bytes
	Quarantine string `json:"quarantine,omitempty"` // directory in the store with what was taken out
	// Breaks are the images that stand on what could not be healed.
	Breaks []string `json:"breaks,omitempty"`
	// Containers run on what was damaged.
	Containers []Container `json:"containers,omitempty"`
	Error      string      `json:"error,omitempty"`
}

// Container runs on a layer that was damaged.
type Container struct {
	ID   string `json:"id"`
	Name string `json:"name,omitempty"`
	// PIDs of processes that hold a damaged file open, mapped or running.
	// They go on with what it holds, and what they start by its name does
	// too: the container has to be started again. Without any, the container
	// may have read it.
	PIDs []int `json:"pids,omitempty"`
}

// The order of steps: lost records first, which everything else is looked up
// by, and blobs before the trees that they describe.
const (
	lostRecords = iota
	blobsFirst
	treesNext
	recordsLast
	afterRecords // what is written or added up from them
)

// orders of the repairs of records, where they are not recordsLast.
var orders = map[string]int{"E2": lostRecords, "E5": afterRecords, "A1": afterRecords, "M4": afterRecords}

// Plan makes the plan for what a check has found. It changes nothing; the plan
// is for this store and this moment.
func (r *Repairer) Plan(ctx context.Context, report *fsck.Report, from Registries) (*Plan, error) {
	known, err := r.takeStock(ctx)
	if err != nil {
		return nil, err
	}
	w := &work{Repairer: r, known: known, registries: from, logged: sync.OnceValue(r.DB.LoggedRecords), restored: map[layout.Node]string{}}
	byObject := map[string]*Step{}
	plan := &Plan{Steps: []*Step{}}
	for _, f := range report.Findings {
		if e, err := edgeOf(f.Object); err == nil && f.Invariant == "E2" {
			w.lost = append(w.lost, e)
		}
		key := w.subject(f)
		step := byObject[key]
		if step == nil {
			if step = w.stepFor(ctx, f); step == nil {
				plan.Left = append(plan.Left, f)
				continue
			}
			byObject[key] = step
			plan.Steps = append(plan.Steps, step)
		}
		step.Findings = append(step.Findings, f)
	}
	slices.SortStableFunc(plan.Steps, func(a, b *Step) int { return cmp.Compare(a.order, b.order) })
	return plan, nil
}

// Run carries a plan out. Steps stand for themselves: what one cannot do is in
// its outcome. The error is the end of ctx, or a store that cannot be written
// to any more.
func (r *Repairer) Run(ctx context.Context, plan *Plan, progress func(*Step)) error {
	r.one.Lock()
	defer r.one.Unlock()
	for _, step := range plan.Steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		step.Done = &Outcome{}
		if err := step.run(ctx, step.Done); err != nil {
			step.Done.Healed = false
			step.Done.Error = err.Error()
		}
		if progress != nil {
			progress(step)
		}
		if err := r.Root.Poisoned(); err != nil {
			return err
		}
	}
	return nil
}

// Checked takes from what was left what a check after the repair does not find
// any more: it was a consequence of something that was repaired.
func (p *Plan) Checked(after *fsck.Report) {
	p.Left = slices.DeleteFunc(p.Left, func(f fsck.Finding) bool { return !after.Has(f) })
}

// work is one repair.
type work struct {
	*Repairer
	known      *stock
	registries Registries
	// logged are the records that the change log has, by bucket and key.
	logged func() map[string]map[string]json.RawMessage
	// lost are the edges with a lost record at an end, and restored says from
	// what those records were made again.
	lost     []layout.Edge
	restored map[layout.Node]string
}

// subject tells which findings are of one step: all of a layer's tree and of a
// blob's file, and each record by itself.
func (w *work) subject(f fsck.Finding) string {
	switch n, ok := node(f); {
	case !ok:
	case isKind(n, layout.KindLayer) && slices.Contains(treeInvariants, f.Invariant):
		return "tree " + string(n)
	case isKind(n, layout.KindBlob) && slices.Contains(blobInvariants, f.Invariant):
		return "blob " + string(n)
	}
	return f.Invariant + " " + f.Object + " " + f.Path
}

var (
	treeInvariants = []string{"L1", "L3", "L4"}
	blobInvariants = []string{"B1", "B2", "B3"}
)

// stepFor returns the step that a finding calls for; nil for none.
func (w *work) stepFor(ctx context.Context, f fsck.Finding) *Step {
	n, _ := node(f)
	_, id := n.Split()
	switch {
	case slices.Contains(treeInvariants, f.Invariant) && isKind(n, layout.KindLayer):
		return w.treeStep(ctx, layout.LayerID(id))
	case slices.Contains(blobInvariants, f.Invariant) && isKind(n, layout.KindBlob):
		return w.blobStep(ctx, layout.BlobDigest(id))
	}
	if mend, ok := recordRepairs[f.Invariant]; ok {
		order, ok := orders[f.Invariant]
		if !ok {
			order = recordsLast
		}
		return &Step{Object: f.Object, Does: f.Repair, order: order, run: func(ctx context.Context, out *Outcome) error {
			err := mend(ctx, w, f, out)
			out.Healed = err == nil
			return err
		}}
	}
	return nil
}

// node returns what a finding is about, if it is a blob or a layer.
func node(f fsck.Finding) (layout.Node, bool) {
	kind, id, ok := strings.Cut(f.Object, " ")
	switch {
	case strings.Contains(id, " "): // a layer's key
	case ok && kind == layout.KindBlob:
		return layout.BlobNode(layout.BlobDigest(id)), true
	case ok && kind == layout.KindLayer:
		return layout.LayerNode(layout.LayerID(id)), true
	}
	return "", false
}

func isKind(n layout.Node, kind string) bool {
	k, _ := n.Split()
	return k == kind
}

// WriteText prints a plan, with what came of it as far as it was carried out.
func (p *Plan) WriteText(out io.Writer) {
	for _, s := range p.Steps {
		fmt.Fprintf(out, "%s: %s", s.Object, s.Does)
		for i, from := range s.From {
			fmt.Fprintf(out, "%s %s", []string{", from", ", or from"}[min(i, 1)], from)
		}
		if s.Fetch > 0 {
			fmt.Fprintf(out, " (%d bytes at most)", s.Fetch)
		}
		fmt.Fprintln(out)
		if s.Done != nil {
			s.Done.writeText(out)
		}
	}
	for _, f := range p.Left {
		fmt.Fprintf(out, "%s: left as it is: %s: %s\n", f.Object, f.Invariant, f.Detail)
	}
}

func (o *Outcome) writeText(out io.Writer) {
	switch {
	case o.Healed && o.From != "":
		fmt.Fprintf(out, "    healed from %s, %d bytes fetched\n", o.From, o.Fetched)
	case o.Healed:
		fmt.Fprintln(out, "    healed")
	default:
		fmt.Fprintf(out, "    NOT healed: %s\n", cmp.Or(o.Error, "nothing has it"))
	}
	if o.Quarantine != "" {
		fmt.Fprintf(out, "    what was bad is kept in %s\n", o.Quarantine)
	}
	for _, image := range o.Breaks {
		fmt.Fprintf(out, "    broken: image %s; pull it to heal it\n", image)
	}
	for _, c := range o.Containers {
		name := cmp.Or(c.Name, c.ID)
		if len(c.PIDs) > 0 {
			fmt.Fprintf(out, "    container %s holds what was bad (processes %v): start it again\n", name, c.PIDs)
		} else {
			fmt.Fprintf(out, "    container %s ran on it and may have read what was bad\n", name)
		}
	}
}
