package corrupttest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"varve.dev/fsck"
	"varve.dev/internal/corrupt"
	"varve.dev/internal/tables"
	"varve.dev/layout"
)

// patience is how long a check of a small store may take before it is said to
// hang.
const patience = 2 * time.Minute

// sampled is of how many cases a short run has one checked by the command too.
const sampled = 8

// TestEveryDamageIsFound damages a store in every way, SEEDS times each (KIND:
// only that one, SEED: the first), and has it checked: by the library, with the
// store closed, and by the command, which opens it.
func TestEveryDamageIsFound(t *testing.T) {
	c := newCampaign(t)
	seeds, first := number(t, "SEEDS"), number(t, "SEED")
	var g errgroup.Group
	g.SetLimit(2)
	for i, kind := range corrupt.Kinds() {
		if only := os.Getenv("KIND"); only != "" && only != kind.Name {
			continue
		}
		for seed := first; seed < first+seeds; seed++ {
			byCommand := os.Getenv("SEEDS") != "" || i%sampled == 0
			g.Go(func() error {
				for _, wrong := range c.one(kind.Name, seed, byCommand) {
					t.Errorf("%s, seed %d: %s", kind.Name, seed, wrong)
				}
				return nil
			})
		}
	}
	_ = g.Wait()
	c.report(t)
}

// campaign is a store that copies are damaged of.
type campaign struct {
	place
	whole string
	cases string // folder for copies

	mu   sync.Mutex
	seen map[string]*tally
}

// tally is what came of one kind of damage.
type tally struct {
	cases, found int
	numbers      []string
}

// newCampaign makes a store, and makes sure that a copy of it is as good.
func newCampaign(t *testing.T) *campaign {
	t.Helper()
	p := newPlace(t)
	c := &campaign{place: p, whole: p.newStore(t), cases: memory(), seen: map[string]*tally{}}
	original, err := trees(c.whole)
	must(t, err)
	must(t, c.copied(func(store, _ string) error {
		found, err := closed(store)
		if err == nil && len(found) > 0 {
			err = fmt.Errorf("before anything was damaged: %+v", found)
		}
		if err != nil {
			return err
		}
		copied, err := trees(store)
		if err == nil && (len(copied) == 0 || !maps.Equal(copied, original)) {
			err = fmt.Errorf("a copy has the trees %v, the store %v", copied, original)
		}
		return err
	}))
	return c
}

// memory is a folder in memory, where copies are quick; "", the usual one, if
// there is none that can hold what a layer may.
func memory() string {
	const dir = "/dev/shm"
	f, err := os.CreateTemp(dir, "varve-corrupt-")
	if err != nil {
		return ""
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if unix.Fsetxattr(int(f.Fd()), "user.try", []byte("1"), 0) != nil {
		return ""
	}
	return dir
}

// copied hands a copy of the store to do, and a folder to use beside it.
func (c *campaign) copied(do func(store, beside string) error) error {
	dir, err := os.MkdirTemp(c.cases, "varve-corrupt-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	store := filepath.Join(dir, "store")
	if err := copyStore(c.whole, store); err != nil {
		return err
	}
	return do(store, dir)
}

// one damages a copy of the store and judges what is said of it.
func (c *campaign) one(kind string, seed uint64, byCommand bool) (wrong []string) {
	var said []fsck.Finding
	err := c.copied(func(store, beside string) error {
		damage, err := corrupt.Do(store, kind, seed)
		if err != nil {
			return err
		}
		if said, err = closed(store); err != nil {
			return fmt.Errorf("%s: %w", damage.Did, err)
		}
		for _, w := range judge(damage, said) {
			wrong = append(wrong, damage.Did+": "+w)
		}
		if !byCommand {
			return nil
		}
		found, err := c.command(store, beside)
		if err != nil {
			return fmt.Errorf("%s: the command: %w", damage.Did, err)
		}
		if rebuilt(found) {
			// Of its records little was told but that.
			damage.May = append(damage.May, damage.Must...)
			damage.Must = slices.DeleteFunc(damage.Must, func(want corrupt.Finding) bool { return want.Invariant[0] != 'M' })
		}
		for _, w := range judge(damage, found) {
			wrong = append(wrong, damage.Did+": the command: "+w)
		}
		return nil
	})
	if err != nil {
		wrong = append(wrong, err.Error())
	}
	c.count(kind, len(wrong) == 0, said)
	return wrong
}

// rebuilt tells whether opening the store has made its database again.
func rebuilt(found []fsck.Finding) bool {
	return slices.ContainsFunc(found, func(f fsck.Finding) bool {
		return f.Healed && slices.Contains([]string{"M1", "M2", "M3", "M5"}, f.Invariant)
	})
}

func (c *campaign) count(kind string, right bool, found []fsck.Finding) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.seen[kind]
	if t == nil {
		t = &tally{}
		c.seen[kind] = t
	}
	t.cases++
	if right {
		t.found++
	}
	for _, f := range found {
		t.numbers = append(t.numbers, f.Invariant)
	}
	slices.Sort(t.numbers)
	t.numbers = slices.Compact(t.numbers)
}

const page = "../../docs/FSCK.md"

var (
	head          = tables.Row{"kind", "damage", "found", "invariants said to be broken"}
	promisedTable = tables.Table{Page: page, Name: "promised damage", Head: head}
	otherTable    = tables.Table{Page: page, Name: "other damage", Head: head}
)

// report prints a line for each kind, and writes the tables.
func (c *campaign) report(t *testing.T) {
	var promised, others []tables.Row
	cases, found := 0, 0
	for _, kind := range corrupt.Kinds() {
		n := c.seen[kind.Name]
		if n == nil {
			continue
		}
		cases, found = cases+n.cases, found+n.found
		r := tables.Row{kind.Name, kind.Does, fmt.Sprintf("%d of %d", n.found, n.cases), strings.Join(n.numbers, " ")}
		t.Log(r)
		if slices.Contains(corrupt.Promised, kind.Name) {
			promised = append(promised, r)
		} else {
			others = append(others, r)
		}
	}
	t.Logf("%d of %d found by their numbers, nothing else reported; %d kinds", found, cases, len(c.seen))
	promisedTable.Write(t, promised...)
	otherTable.Write(t, others...)
}

// closed checks a store that nobody has open.
func closed(dir string) ([]fsck.Finding, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	report, err := fsck.Run(ctx, fsck.Options{Root: dir, Level: layout.Deep})
	if err != nil {
		return nil, err
	}
	return report.Findings, nil
}

// command has `varve fsck` check a store, which opens it if it can.
func (c *campaign) command(store, state string) ([]fsck.Finding, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(c.bin, "varve"), "fsck", "--deep", "--json", "--root", store, "--state", state)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return nil, err
	}
	var report fsck.Report
	if jerr := json.Unmarshal(out, &report); jerr != nil {
		return nil, fmt.Errorf("%w: %w: %s", jerr, err, said.String())
	}
	for i, f := range report.Findings {
		if f.PathBytes != nil {
			report.Findings[i].Path = string(f.PathBytes)
		}
	}
	if code := cmd.ProcessState.ExitCode(); code != exitCode(report.Findings) {
		return nil, fmt.Errorf("exit code %d for %+v", code, report.Findings)
	}
	return report.Findings, nil
}

// number is what the environment asks for; 1 if it does not.
func number(t *testing.T, variable string) uint64 {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return 1
	}
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n
}
