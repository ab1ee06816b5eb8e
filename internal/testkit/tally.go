package testkit

import (
	"fmt"
	"strings"
)

// Tally counts cases by kind and outcome.
type Tally struct{ counts map[string]map[string]int }

// Add counts a case.
func (t *Tally) Add(kind, outcome string) {
	if t.counts == nil {
		t.counts = map[string]map[string]int{}
	}
	if t.counts[kind] == nil {
		t.counts[kind] = map[string]int{}
	}
	t.counts[kind][outcome]++
}

// Total is how many cases had that outcome.
func (t *Tally) Total(outcome string) (n int) {
	for _, by := range t.counts {
		n += by[outcome]
	}
	return n
}

// Table returns a table for a page of the documentation: a line for each kind,
// a column for each outcome, and the sums.
func (t *Tally) Table(what string, kinds, outcomes []string) string {
	var out strings.Builder
	line := func(kind, cases string, cell func(outcome string) any) {
		fmt.Fprintf(&out, "| %s | %s |", kind, cases)
		for _, o := range outcomes {
			fmt.Fprintf(&out, " %v |", cell(o))
		}
		out.WriteByte('\n')
	}
	line(what, "cases", func(o string) any { return o })
	line("---", "---", func(string) any { return "---" })
	sum := 0
	for _, k := range kinds {
		n := 0
		for _, count := range t.counts[k] {
			n += count
		}
		sum += n
		line(k, fmt.Sprint(n), func(o string) any { return t.counts[k][o] })
	}
	line("all", fmt.Sprint(sum), func(o string) any { return t.Total(o) })
	return out.String()
}
