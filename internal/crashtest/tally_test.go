package crashtest

import (
	"fmt"
	"strings"
	"sync"
	"text/tabwriter"
)

// tally counts for all machines.
type tally struct {
	mu                   sync.Mutex
	cases, kills, stores int
	started              map[string]int
	killed               map[victim]int
}

func newTally() *tally { return &tally{started: map[string]int{}, killed: map[victim]int{}} }

// maxPerKill bounds the cases in which nobody was killed in time.
const maxPerKill = 3

// more tells whether there are too few kills yet.
func (c *tally) more(want int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kills < want && c.cases < maxPerKill*want
}

func (c *tally) newStore() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stores++
}

func (c *tally) add(h happened) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cases++
	for _, r := range h.all {
		c.started[r.kind]++
	}
	if len(h.killed) > 0 {
		c.kills++
	}
	for _, v := range h.killed {
		c.killed[v]++
	}
}

// String is the table: a line for each kind of command, a column for each part
// that it had when it was killed.
func (c *tally) String() string {
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "command\truns\t%s\tkilled\t\n", strings.Join(parts(), "\t"))
	for _, a := range repertoire() {
		fmt.Fprintf(w, "%s\t%d\t", a.kind, c.started[a.kind])
		sum := 0
		for _, p := range parts() {
			n := c.killed[victim{p, a.kind}]
			sum += n
			fmt.Fprintf(w, "%d\t", n)
		}
		fmt.Fprintf(w, "%d\t\n", sum)
	}
	_ = w.Flush()
	return text.String()
}
