package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
	"golang.org/x/term"

	"varve.dev/api/varve"
)

// progress shows events: on a terminal a block of lines that is drawn anew,
// elsewhere one plain line for each change of phase.
type progress struct {
	w     io.Writer
	fd    int // of the terminal, or -1
	quiet bool

	mu      sync.Mutex
	order   []string
	state   map[string]varve.Event
	started map[string]time.Time
	drawn   int // lines of the block on the screen
	last    time.Time
	partial map[string]string // a step's log after its last newline
}

// redraw is the shortest time between two drawings of the block.
const redraw = 100 * time.Millisecond

func newProgress(w io.Writer, quiet bool) *progress {
	p := &progress{w: w, fd: -1, quiet: quiet,
		state: map[string]varve.Event{}, started: map[string]time.Time{}, partial: map[string]string{}}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.fd = int(f.Fd())
	}
	return p
}

func (p *progress) event(e varve.Event) {
	if p.quiet && e.Phase != varve.Failed && e.Phase != varve.Warning {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.Phase == varve.Warning {
		p.print("warning: " + e.Text)
		return
	}
	if len(e.Log) > 0 {
		p.log(e)
		return
	}
	old, known := p.state[e.ID]
	if !known {
		p.order = append(p.order, e.ID)
		p.started[e.ID] = time.Now()
	}
	if e.Name == "" {
		e.Name = old.Name
	}
	p.state[e.ID] = e
	if p.fd < 0 {
		if !known || old.Phase != e.Phase {
			p.plain(e)
		}
		return
	}
	if now := time.Now(); ended(e.Phase) || now.Sub(p.last) >= redraw {
		p.last = now
		p.draw()
	}
}

func ended(phase varve.Phase) bool {
	switch phase {
	case varve.Done, varve.Cached, varve.Exists, varve.Failed:
		return true
	}
	return false
}

// log prints the whole lines of a step's output above the block.
func (p *progress) log(e varve.Event) {
	text := p.partial[e.ID] + string(e.Log)
	end := strings.LastIndexByte(text, '\n')
	p.partial[e.ID] = text[end+1:]
	if end < 0 {
		return
	}
	prefix := p.label(e.ID)
	for line := range strings.SplitSeq(text[:end], "\n") {
		// A carriage return would let a program's own progress bar write
		// over what stands above.
		line = line[strings.LastIndexByte(strings.TrimRight(line, "\r"), '\r')+1:]
		p.print(prefix + " | " + strings.TrimRight(line, "\r"))
	}
}

// label is the number of a step or layer in the order of appearance.
func (p *progress) label(id string) string {
	for i, known := range p.order {
		if known == id {
			return fmt.Sprintf("#%d", i+1)
		}
	}
	return "#?"
}

func (p *progress) plain(e varve.Event) {
	line := fmt.Sprintf("%s %s", p.label(e.ID), describe(e))
	if ended(e.Phase) {
		line += fmt.Sprintf(" (%.1fs)", time.Since(p.started[e.ID]).Seconds())
	}
	fmt.Fprintln(p.w, line)
}

func describe(e varve.Event) string {
	s := fmt.Sprintf("%-11s %s", e.Phase, e.Name)
	if e.Text != "" {
		s += ": " + e.Text
	}
	return s
}

// print writes a line that stays, above the block.
func (p *progress) print(line string) {
	p.erase()
	fmt.Fprintln(p.w, line)
	if p.fd >= 0 {
		p.draw()
	}
}

// erase takes the block off the screen.
func (p *progress) erase() {
	if p.drawn > 0 {
		fmt.Fprintf(p.w, "\x1b[%dA\x1b[J", p.drawn)
		p.drawn = 0
	}
}

// draw writes the block: what is finished stays above it for good.
func (p *progress) draw() {
	p.erase()
	width, height, err := term.GetSize(p.fd)
	if err != nil {
		width, height = 80, 24
	}
	var lines []string
	for i, id := range p.order {
		lines = append(lines, p.line(i+1, p.state[id], width))
	}
	if room := height - 1; len(lines) > room {
		lines = lines[len(lines)-room:]
	}
	for _, l := range lines {
		fmt.Fprintln(p.w, l)
	}
	p.drawn = len(lines)
}

// barWidth is the width of a progress bar in columns.
const barWidth = 20

func (p *progress) line(n int, e varve.Event, width int) string {
	s := fmt.Sprintf("#%d %s", n, describe(e))
	if !ended(e.Phase) && e.Total > 0 {
		full := int(barWidth * min(e.Current, e.Total) / e.Total)
		s += fmt.Sprintf(" [%s%s] %s/%s", strings.Repeat("=", full), strings.Repeat(" ", barWidth-full),
			units.HumanSize(float64(e.Current)), units.HumanSize(float64(e.Total)))
		s += speed(e, time.Since(p.started[e.ID]))
	} else if !ended(e.Phase) {
		s += fmt.Sprintf(" %.1fs", time.Since(p.started[e.ID]).Seconds())
	}
	if r := []rune(s); len(r) > width-1 {
		s = string(r[:max(0, width-2)]) + "…"
	}
	return s
}

// settled is how long something has to be under way before its speed says when
// it will end.
const settled = 2 * time.Second

// speed is how fast something goes and when it will have ended, for what has
// been going for a while.
func speed(e varve.Event, since time.Duration) string {
	if since < settled || e.Current <= 0 || e.Current > e.Total {
		return ""
	}
	rate := float64(e.Current) / since.Seconds()
	left := time.Duration(float64(e.Total-e.Current) / rate * float64(time.Second))
	return fmt.Sprintf(", %s/s, %s left", units.HumanSize(rate), left.Round(time.Second))
}

// finish leaves the last state on the screen.
func (p *progress) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, id := range p.order {
		if rest := p.partial[id]; rest != "" {
			p.partial[id] = ""
			p.print(p.label(id) + " | " + rest)
		}
	}
	if p.fd >= 0 {
		p.draw()
		p.drawn = 0
	}
}
