package crashtest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// The parts that a command had when somebody was killed: the columns of the
// campaign's table.
const (
	alone    = "alone"    // it had the store open, and was killed
	asHost   = "host"     // the same, with a guest
	asGuest  = "guest"    // it was killed; its host lived on
	asClient = "client"   // it was killed; the daemon lived on
	inDaemon = "daemon"   // it was under way in a daemon that was killed
	recovers = "recovery" // it was killed while it recovered the store
)

// parts are the columns in order.
func parts() []string { return []string{alone, asHost, asGuest, asClient, inDaemon, recovers} }

// happened is what became of the commands of one case.
type happened struct {
	all    []*running
	killed []victim
	// orderly tells that nobody was killed who had the store open: it is to
	// be whole without being opened again.
	orderly bool
	wrong   []string
}

type victim struct{ part, kind string }

// String tells which commands a case had and which were killed when.
func (h happened) String() string {
	var parts []string
	for _, r := range h.all {
		s := r.order.String()
		if r.victim {
			s += fmt.Sprintf(" (killed after %v)", r.took.Round(time.Millisecond))
		}
		parts = append(parts, s)
	}
	return fmt.Sprintf("%s; killed: %v", strings.Join(parts, " beside "), h.killed)
}

func (h *happened) note(err error) {
	if err != nil {
		h.wrong = append(h.wrong, err.Error())
	}
}

// plan chooses what a client runs.
func (m *machine) plan(client int, among ...string) order {
	list := repertoire()
	for {
		a := list[m.random.IntN(len(list))]
		if len(among) > 0 && !slices.Contains(among, a.kind) {
			continue
		}
		if o, ok := a.plan(m, client); ok {
			o.kind = a.kind
			return o
		}
	}
}

// moment is some time within the usual length of a command.
func (m *machine) moment(kind string) time.Duration {
	return time.Duration(m.random.Int64N(int64(max(m.usual[kind], time.Millisecond))))
}

// killAt kills a command when it is that old, if it is under way then.
func (m *machine) killAt(r *running, age time.Duration) {
	select {
	case <-r.ended:
	case <-time.After(age - time.Since(r.began)):
		m.kill(r)
	}
}

// runAlone kills a command that has the store to itself.
func (m *machine) runAlone() (h happened) {
	r, err := m.start(m.plan(m.random.IntN(clients)))
	if h.note(err); err != nil {
		return h
	}
	m.killAt(r, m.moment(r.kind))
	h.all = []*running{r}
	h.orderly = !r.killed()
	if r.killed() {
		h.killed = []victim{{alone, r.kind}}
	}
	return h
}

// long are the kinds that others find at work.
var long = []string{"pull", "build fresh", "build changed", "load", "save", "push", "pull again", "build cached"}

// runGuest starts a second command while a first one has the store open, and
// kills either.
func (m *machine) runGuest() (h happened) {
	first := m.random.IntN(clients)
	host, err := m.start(m.plan(first, long...))
	if h.note(err); err != nil {
		return h
	}
	h.all = append(h.all, host)
	for !host.over() && !m.serves() && time.Since(host.began) < time.Second {
		time.Sleep(time.Millisecond)
	}
	guest, err := m.start(m.plan((first + 1) % clients))
	if h.note(err); err != nil {
		h.note(host.wait())
		return h
	}
	h.all = append(h.all, guest)
	chosen, part := host, asHost
	if m.random.IntN(2) == 0 {
		chosen, part = guest, asGuest
	}
	m.killAt(chosen, m.moment(chosen.kind))
	// A guest may have become a host, and a host may have none yet.
	h.orderly = !chosen.killed() || chosen == guest && !host.over()
	if chosen.killed() {
		if chosen == guest && host.over() || chosen == host && guest.over() {
			part = alone
		}
		h.killed = []victim{{part, chosen.kind}}
	}
	h.note(errors.Join(host.wait(), guest.wait()))
	return h
}

// serves tells whether a command serves the store to others.
func (m *machine) serves() bool {
	found, err := filepath.Glob(filepath.Join(m.state, "embedded-*.sock"))
	return err == nil && len(found) > 0
}

// runDaemon lets some clients work in a daemon and kills it, or one of them.
func (m *machine) runDaemon() (h happened) {
	d, err := m.startDaemon()
	if h.note(err); err != nil {
		return h
	}
	for c := range 1 + m.random.IntN(clients) {
		r, err := m.start(m.plan(c))
		if h.note(err); err == nil {
			h.all = append(h.all, r)
		}
	}
	chosen := m.someone(h.all)
	if m.random.IntN(2) == 0 {
		time.Sleep(time.Until(chosen.began.Add(m.moment(chosen.kind))))
		for _, r := range h.all {
			if !r.over() {
				h.killed = append(h.killed, victim{inDaemon, r.kind})
			}
		}
		m.kill(d)
	} else {
		m.killAt(chosen, m.moment(chosen.kind))
		h.orderly = true
		if chosen.killed() {
			h.killed = []victim{{asClient, chosen.kind}}
		}
	}
	for _, r := range h.all {
		h.note(r.wait())
	}
	if d.over() {
		h.note(d.crashed())
		return h
	}
	_, err = m.ask("fsck")
	h.note(errors.Join(err, d.endDaemon()))
	return h
}

// judge enters in the ledger what became of the commands. One that was not
// killed has succeeded, unless what it asked was, and it is none of those that
// ask again.
func (m *machine) judge(h *happened) {
	for _, r := range h.all {
		excused := r.killed() || len(h.killed) > 0 && !h.orderly && !r.again
		acknowledged := r.code() == 0
		switch {
		case acknowledged:
			if known := m.usual[r.kind]; known > 0 && !r.victim {
				m.usual[r.kind] = (3*known + r.took) / 4
			}
			if r.done != nil {
				if err := r.done(); err != nil {
					h.note(fmt.Errorf("%s: %w", r.order, err))
				}
			}
		case !excused:
			h.note(fmt.Errorf("%s: exit code %d: %s", r.order, r.code(), r.printed(aPage)))
		}
		m.told.enter(r.order, acknowledged)
		h.note(errors.Join(r.crashed(), os.Remove(r.out)))
	}
}
