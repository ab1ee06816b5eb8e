package crashtest

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"varve.dev/layout"
)

// lanes is how many machines are at work at once.
const lanes = 2

// TestKillCommands kills varve's own commands, and its daemon, at random
// moments: each alone, as the host of another or its guest, as the client of
// a daemon or in a daemon that is killed, and while they recover what the last
// kill has left. The stores live on from case to case. After each, everything
// acknowledged is there, nothing is left behind, and du finds what the records
// account for.
func TestKillCommands(t *testing.T) {
	kills := caseCount(t, 15) * 4 / 5
	s := newSupplies(t)
	began := time.Now()
	usual := measure(t, s)
	c := newTally()
	t.Run("lanes", func(t *testing.T) {
		for lane := 1; lane <= lanes; lane++ {
			t.Run(fmt.Sprint(lane), func(t *testing.T) {
				t.Parallel()
				m := newMachine(t, s, lane, maps.Clone(usual))
				for c.more(kills) {
					m.oneCase(t, c)
				}
				if m.age > 0 {
					m.endStore(t)
				}
			})
		}
	})
	t.Logf("%d kills in %d cases on %d stores, %v; du finds %s\n%s", c.kills, c.cases, c.stores, time.Since(began).Round(time.Second), &s.gap, c)
	if c.kills < kills {
		t.Errorf("%d of %d were killed in time", c.kills, kills)
	}
}

// measure runs every kind of command once and returns how long each takes.
func measure(t *testing.T, s *supplies) map[string]time.Duration {
	t.Helper()
	m := newMachine(t, s, 0, map[string]time.Duration{})
	m.begin(t)
	for _, a := range repertoire() {
		o, ok := a.plan(m, 0)
		if !ok {
			t.Fatalf("%s has nothing to work on", a.kind)
		}
		o.kind = a.kind
		r, err := m.run(o)
		must(t, err)
		m.usual[a.kind] = r.took
		h := happened{all: []*running{r}, orderly: true}
		m.judge(&h)
		m.verdict(t, "every command once: "+a.kind, h, layout.Deep)
	}
	return m.usual
}

// begin gives the store the image that builds and containers stand on. The
// first try may be killed: then it is the making of the store that is.
func (m *machine) begin(t *testing.T) {
	t.Helper()
	o := m.pullOf(m.supplies.small())
	r, err := m.run(o)
	must(t, err)
	h := happened{all: []*running{r}, orderly: true}
	m.judge(&h)
	m.verdict(t, "the first image", h, layout.Normal)
}

// storeLife is how many cases a store sees, on the average.
const storeLife = 30

// oneCase kills something at work on the machine's store, and judges.
func (m *machine) oneCase(t *testing.T, c *tally) {
	t.Helper()
	if m.age == 0 {
		m.newStore(t)
		c.newStore()
	}
	m.age++
	settings := []func() happened{m.runAlone, m.runGuest, m.runDaemon}
	h := settings[m.random.IntN(len(settings))]()
	m.judge(&h)
	if len(h.killed) > 0 && !h.orderly && m.random.IntN(4) == 0 {
		m.killRecovery(&h)
	}
	level := layout.Normal
	if m.random.IntN(5) == 0 {
		level = layout.Deep
	}
	m.verdict(t, fmt.Sprintf("seed %d, %s", seed(t), h), h, level)
	c.add(h)
	if !m.hasSmall() {
		m.begin(t)
	}
	if m.random.IntN(storeLife) == 0 {
		m.endStore(t)
	}
}

// killRecovery kills a command that recovers the store.
func (m *machine) killRecovery(h *happened) {
	r, err := m.start(order{kind: "images", args: []string{"images"}})
	if h.note(err); err != nil {
		return
	}
	m.killAt(r, m.moment(r.kind))
	if r.killed() {
		h.killed = append(h.killed, victim{recovers, r.kind})
	}
	h.note(os.Remove(r.out))
}

// verdict looks at what is left of a case, and has the test fail for what
// should not be. The store stays for nobody to look at: the next is new.
func (m *machine) verdict(t *testing.T, what string, h happened, level layout.Level) {
	t.Helper()
	wrong := h.wrong
	if h.orderly {
		wrong = append(wrong, m.outside()...)
		for _, w := range m.closed(level, false) {
			wrong = append(wrong, "before it is opened again: "+w)
		}
	}
	printed, err := m.ask("images", "--digests")
	if err == nil {
		err = m.tidyState()
	}
	if err != nil {
		wrong = append(wrong, err.Error())
	}
	wrong = slices.Concat(wrong, m.told.settleImages(printed), m.outside(), m.closed(level, true))
	if len(wrong) > 0 {
		t.Errorf("%s:\n  %s", what, strings.Join(wrong, "\n  "))
		m.age = 0
	}
}

// tidyState opens the store once more if anything is left in --state when no
// process works for it any more: a step that was still ending can have kept its
// folder from being removed.
func (m *machine) tidyState() error {
	for deadline := time.Now().Add(patience); len(m.processes()) > 0 && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	if len(m.inState()) == 0 {
		return nil
	}
	_, err := m.ask("info")
	return err
}

// endStore pulls all that was ever pulled in part: no unfinished blob is left.
func (m *machine) endStore(t *testing.T) {
	t.Helper()
	h := happened{orderly: true}
	for c := range clients {
		for _, name := range m.pulled(c) {
			r, err := m.run(m.pullOf(name))
			must(t, err)
			h.all = append(h.all, r)
		}
	}
	m.judge(&h)
	m.verdict(t, "every image pulled", h, layout.Deep)
	each(m.root, layout.IngestDir, func(name string) { t.Errorf("every image is pulled, and there is ingest/%s", name) })
	m.loseDatabase(t)
	m.age = 0
}

// loseDatabase takes the database and its log away. What is the users' stays,
// and is told.
func (m *machine) loseDatabase(t *testing.T) {
	t.Helper()
	volume := layout.VolumesDir + "/mine/_data"
	must(t, os.MkdirAll(filepath.Join(m.root, volume), 0o755))
	users := []string{volume}
	for _, dir := range []string{layout.ContainersDir, layout.ActiveDir} {
		each(m.root, dir, func(name string) {
			written, err := os.ReadDir(filepath.Join(m.root, dir, name, layout.TreeDir))
			if dir == layout.ContainersDir || err == nil && len(written) > 0 {
				users = append(users, dir+"/"+name)
			}
		})
	}
	must(t, errors.Join(os.Remove(filepath.Join(m.root, layout.DatabaseFile)), os.Remove(filepath.Join(m.root, layout.LogFile))))
	for round := range 2 {
		told, err := m.ask("info")
		must(t, err)
		for _, name := range users {
			if _, err := os.Lstat(filepath.Join(m.root, name)); err != nil {
				t.Errorf("opening %d after the loss of the database: %v", round+1, err)
			}
			if round == 0 && name != volume && !strings.Contains(told, name) {
				t.Errorf("after the loss of the database nobody tells of %s: %s", name, told)
			}
		}
	}
}
