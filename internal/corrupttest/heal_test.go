package corrupttest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/fsck"
	"varve.dev/internal/corrupt"
	"varve.dev/internal/tables"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/repair"
)

// mode is what a store has to be healed from.
type mode struct {
	name     string
	store    string // one of healStores
	registry bool   // can be reached
	// later: a pull heals what a repair without a registry could not.
	later bool
}

var modes = []mode{
	{name: "blobs kept, no registry", store: "kept"},
	{name: "blobs given up, another layer has the same", store: "same"},
	{name: "blobs given up, registry", store: "given", registry: true},
	{name: "blobs given up, nothing; then a pull", store: "given", later: true},
}

// atOnce is how many stores are healed at a time.
const atOnce = 2

// nowhere is an address at which nobody answers.
const nowhere = "127.0.0.1:1"

// TestHeals damages a store in each of the ways that are promised to heal,
// SEEDS times for each mode (KIND: only that one, SEED: the first), repairs it
// and judges what that made of it.
func TestHeals(t *testing.T) {
	p := newPlace(t)
	h := &healing{place: p, stores: healStores(t, p), cases: memory(), proxies: make(chan *testkit.Proxy, atOnce), seen: map[string]map[string]int{}}
	for range atOnce {
		h.proxies <- testkit.NewProxy(t, p.registry.Addr, nil)
	}
	seeds, first := number(t, "SEEDS"), number(t, "SEED")
	var g errgroup.Group
	g.SetLimit(atOnce)
	for i, kind := range corrupt.Promised {
		if only := os.Getenv("KIND"); only != "" && only != kind {
			continue
		}
		for m := range modes {
			for seed := first; seed < first+seeds; seed++ {
				// Of a mode's cases some are the command's, in turn.
				c := &healCase{healing: h, mode: modes[m], kind: kind, seed: seed, byCommand: (i+m+int(seed))%sampled == 0}
				g.Go(func() error {
					cell, wrong := c.run(t.Context())
					h.count(kind, c.mode.name, cell)
					for _, w := range wrong {
						t.Errorf("%s, %s, seed %d: %s: %s", kind, c.mode.name, c.seed, c.damage.Did, w)
					}
					return nil
				})
			}
		}
	}
	_ = g.Wait()
	h.sees(t)
	h.report(t)
}

// sees makes sure that the judge complains of a repair that did nothing and says
// that it healed.
func (h *healing) sees(t *testing.T) {
	c := &healCase{healing: h, mode: modes[0], kind: "truncate", seed: 1, idle: true}
	if _, wrong := c.run(t.Context()); len(wrong) < 2 {
		t.Errorf("of a repair that did nothing the judge says %q", wrong)
	}
}

// healing is a matrix of what heals from where.
type healing struct {
	place
	stores  map[string]*original
	cases   string
	proxies chan *testkit.Proxy // before the registry; they count for one case at a time

	mu   sync.Mutex
	seen map[string]map[string]int // kind and mode → cell → cases
}

func (h *healing) count(kind, mode, cell string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	key := kind + "\x00" + mode
	if h.seen[key] == nil {
		h.seen[key] = map[string]int{}
	}
	h.seen[key][cell]++
}

var healingTable = func() tables.Table {
	head := tables.Row{"kind", "damage"}
	for _, m := range modes {
		head = append(head, m.name)
	}
	return tables.Table{Page: page, Name: "healing", Head: head}
}()

func (h *healing) report(t *testing.T) {
	var rows []tables.Row
	for _, kind := range corrupt.Kinds() {
		if h.seen[kind.Name+"\x00"+modes[0].name] == nil {
			continue
		}
		row := tables.Row{kind.Name, kind.Does}
		for _, m := range modes {
			var cell []string
			for _, from := range ways {
				if n := h.seen[kind.Name+"\x00"+m.name][from]; n > 0 {
					cell = append(cell, fmt.Sprintf("%d %s", n, from))
				}
			}
			row = append(row, strings.Join(cell, ", "))
		}
		t.Log(row)
		rows = append(rows, row)
	}
	healingTable.Write(t, rows...)
}

// healCase is one damage and its repair.
type healCase struct {
	*healing
	mode      mode
	kind      string
	seed      uint64
	byCommand bool
	idle      bool // for sees

	store, beside string // the copy, and a folder for what is not in it
	hosts         string // hosts.toml for whatever registry
	damage        corrupt.Damage
	bad           map[string]string // what stood at a damaged path
}

// repaired is what a repair says of itself.
type repaired struct {
	Report fsck.Report
	Plan   repair.Plan
	code   int
}

// run returns where the store was healed from and what is wrong with that.
func (c *healCase) run(ctx context.Context) (cell string, wrong []string) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := func() (err error) {
		if c.beside, err = os.MkdirTemp(c.cases, "varve-heal-"); err != nil {
			return err
		}
		defer os.RemoveAll(c.beside)
		c.store = filepath.Join(c.beside, "store")
		if err := copyStore(c.stores[c.mode.store].dir, c.store); err != nil {
			return err
		}
		if c.damage, err = corrupt.Do(c.store, c.kind, c.seed); err != nil {
			return err
		}
		c.bad = c.standing()
		cell, wrong, err = c.heal(ctx)
		return err
	}()
	if err != nil {
		wrong = append(wrong, err.Error())
	}
	return cell, wrong
}

// heal repairs, judges, and for the last mode pulls what is broken.
func (c *healCase) heal(ctx context.Context) (cell string, wrong []string, err error) {
	registry := <-c.proxies
	registry.Forget()
	defer func() { c.proxies <- registry }()
	if c.hosts, err = hostsFor(c.beside, nowhere); err != nil {
		return "", nil, err
	}
	if c.mode.registry {
		if c.hosts, err = hostsFor(c.beside, registry.Addr); err != nil {
			return "", nil, err
		}
	}
	run := c.byEngine
	switch {
	case c.byCommand:
		run = c.byHand
	case c.idle:
		run = c.byNobody
	}
	said, err := run(ctx)
	if err != nil {
		return "", nil, err
	}
	wrong = append(c.judge(said), c.served(said, registry)...)
	if !c.mode.later {
		return wayOf(said), wrong, nil
	}
	if c.hosts, err = hostsFor(c.beside, registry.Addr); err != nil {
		return "", wrong, err
	}
	return wayOf(said), append(wrong, c.pulled(ctx, said)...), nil
}

// byEngine repairs as a daemon does.
func (c *healCase) byEngine(ctx context.Context) (said *repaired, err error) {
	said = &repaired{}
	return said, c.open(ctx, func(e *daemon.Engine) error {
		r, err := e.Fsck(ctx, varve.FsckRequest{Level: string(layout.Deep), Repair: true, Registry: varve.Registry{HostsDir: c.hosts}}, nil)
		if err != nil {
			return err
		}
		said.code = r.ExitCode
		return errors.Join(json.Unmarshal(r.Report, &said.Report), json.Unmarshal(r.Plan, &said.Plan))
	})
}

// open opens the store. A process that was begun beside may have got the lock of
// whoever read the database last with it, until it becomes another program.
func (c *healCase) open(ctx context.Context, do func(*daemon.Engine) error) error {
	var e *daemon.Engine
	var err error
	for e == nil && ctx.Err() == nil {
		e, err = daemon.Open(ctx, daemon.Options{Root: c.store, State: c.beside, Look: true})
		if !errors.Is(err, metadata.ErrLocked) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		return err
	}
	return errors.Join(do(e), e.Close(ctx))
}

// byHand repairs as a user does.
func (c *healCase) byHand(ctx context.Context) (*repaired, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(c.bin, "varve"), "fsck", "--deep", "--repair", "--json", "--hosts-dir", c.hosts, "--root", c.store, "--state", c.beside)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return nil, err
	}
	said := &repaired{code: cmd.ProcessState.ExitCode()}
	if err := json.Unmarshal(out, said); err != nil {
		return nil, fmt.Errorf("the command: %w: %s", err, complaints.String())
	}
	return said, nil
}

// byNobody only plans, and says that all of it was done.
func (c *healCase) byNobody(ctx context.Context) (said *repaired, err error) {
	said = &repaired{}
	err = c.open(ctx, func(e *daemon.Engine) error {
		r, err := e.Fsck(ctx, varve.FsckRequest{Level: string(layout.Deep), Plan: true}, nil)
		if err != nil {
			return err
		}
		return json.Unmarshal(r.Plan, &said.Plan)
	})
	for _, s := range said.Plan.Steps {
		s.Done = &repair.Outcome{Healed: true}
	}
	return said, err
}

// pulled pulls what was broken, and tells what is wrong then.
func (c *healCase) pulled(ctx context.Context, said *repaired) (wrong []string) {
	was := c.stores[c.mode.store]
	broken := said.broken()
	now := standingTrees(c.store)
	for image, tree := range was.trees {
		if now[image] != tree {
			broken = append(broken, image)
		}
	}
	slices.Sort(broken)
	err := c.open(ctx, func(e *daemon.Engine) (err error) {
		for _, image := range slices.Compact(broken) {
			_, perr := e.Pull(ctx, varve.PullRequest{Reference: c.source(image), Registry: varve.Registry{HostsDir: c.hosts}}, nil)
			err = errors.Join(err, perr)
		}
		return err
	})
	if err != nil {
		wrong = append(wrong, "a pull afterwards: "+err.Error())
	}
	return append(wrong, c.judgePulled()...)
}

// source is where the registry has an image.
func (c *healCase) source(image string) string {
	switch name := strings.TrimPrefix(image, "docker.io/library/"); {
	case slices.Contains(built, name):
		return c.ref(name)
	case name == "kept:1":
		return c.ref(stackedName)
	case name == "made:again":
		return c.ref("made:1")
	}
	return image
}
