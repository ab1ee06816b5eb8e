package crashtest

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"varve.dev/layout"
)

// TestLeftoversAreSeen leaves by hand what a killed command could, and alters
// the ledger: the campaign's judgement names each, and nothing else.
func TestLeftoversAreSeen(t *testing.T) {
	s := newSupplies(t)
	m := newMachine(t, s, 0, map[string]time.Duration{})
	m.begin(t)
	for _, plan := range []func(*machine, int) (order, bool){(*machine).pull, (*machine).runAndKeep} {
		o, _ := plan(m, 0)
		r, err := m.run(o)
		must(t, err)
		m.judge(&happened{all: []*running{r}})
	}
	m.verdict(t, "nothing planted", happened{}, layout.Normal)
	if t.Failed() {
		return
	}
	mkdir := func(name string) func(t *testing.T) {
		return func(t *testing.T) { must(t, os.Mkdir(filepath.Join(m.root, name), 0o700)) }
	}
	write := func(name string, size int) func(t *testing.T) {
		return func(t *testing.T) { must(t, os.WriteFile(filepath.Join(m.root, name), make([]byte, size), 0o444)) }
	}
	for _, p := range []struct {
		what  string
		plant func(*testing.T)
		path  string // of what was planted
		seen  string
	}{
		{"an ingest without a description", mkdir("ingest/x"), "ingest/x", "an unfinished blob"},
		{"a blob of nobody", write("blobs/sha256/00/"+strings.Repeat("0", 64), 1), "blobs/sha256/00/" + strings.Repeat("0", 64), "B4"},
		{"a layer of nobody", mkdir("layers/x"), "layers/x", "L2"},
		{"a writable layer of nobody", mkdir("active/x"), "active/x", "S4"},
		{"a container of nobody", mkdir("containers/x"), "containers/x", "C2"},
		{"a cache mount that was begun", mkdir("cachemounts/x.new"), "cachemounts/x.new", "never finished"},
		{"a temporary file", write(".tmp-1-x", 1), ".tmp-1-x", "left: .tmp-1-x"},
		{"something in the trash", mkdir("trash/x"), "trash/x", "left: trash/x"},
		{"something in staging", mkdir("staging/x"), "staging/x", "G1"},
		{"a file beyond the records", write(m.someLayer(t)+"/fs/more", 64<<10), m.someLayer(t) + "/fs/more", "du finds"},
	} {
		p.plant(t)
		wrong := m.closed(layout.Normal, true)
		if !slices.ContainsFunc(wrong, func(w string) bool { return strings.Contains(w, p.seen) }) {
			t.Errorf("%s: seen was %q, not %q", p.what, wrong, p.seen)
		}
		must(t, os.RemoveAll(filepath.Join(m.root, p.path)))
	}
	if wrong := m.closed(layout.Normal, true); len(wrong) > 0 {
		t.Errorf("nothing is planted any more: %q", wrong)
	}
	m.seesOutside(t)
	m.seesLedger(t)
}

// someLayer is the directory of one of the layers.
func (m *machine) someLayer(t *testing.T) string {
	t.Helper()
	r, err := readRecords(m.root)
	must(t, err)
	return layout.LayerPath(layout.LayerID(slices.Min(slices.Collect(maps.Keys(r.layers)))))
}

// seesOutside leaves a file and a process.
func (m *machine) seesOutside(t *testing.T) {
	t.Helper()
	stray := filepath.Join(m.state, "scratch-1")
	must(t, os.Mkdir(stray, 0o700))
	if len(m.inState()) == 0 {
		t.Error("a folder in --state was not seen")
	}
	must(t, os.Remove(stray))
	d, err := m.startDaemon()
	must(t, err)
	if len(m.processes()) == 0 {
		t.Error("a process was not seen")
	}
	must(t, d.endDaemon())
	if left := m.outside(); len(left) > 0 {
		t.Errorf("outside: %q", left)
	}
}

// seesLedger compares what is there with a ledger that is wrong.
func (m *machine) seesLedger(t *testing.T) {
	t.Helper()
	printed, err := m.ask("images", "--digests")
	must(t, err)
	r, err := readRecords(m.root)
	must(t, err)
	name := m.supplies.small()
	container := slices.Min(slices.Collect(maps.Keys(m.told.containers)))
	for what, change := range map[string]func(told){
		"an image that should be gone":            func(l told) { l.images[name] = []string{gone} },
		"an image that stands for something else": func(l told) { l.images[name] = []string{"sha256:0", gone} },
		"an image that is lost":                   func(l told) { l.images["lost:1"] = []string{anyOf} },
		"an image that nobody acknowledged":       func(l told) { delete(l.images, name) },
		"a container that is lost":                func(l told) { l.containers["lost"] = []string{ran} },
		"a container that nobody acknowledged":    func(l told) { delete(l.containers, container) },
		"a container that should be gone":         func(l told) { l.containers[container] = []string{gone} },
	} {
		l := told{images: maps.Clone(m.told.images), containers: maps.Clone(m.told.containers)}
		change(l)
		if wrong := append(l.settleImages(printed), l.settleContainers(m.root, r)...); len(wrong) != 1 {
			t.Errorf("%s: seen was %q", what, wrong)
		}
	}
}
