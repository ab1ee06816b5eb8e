package bench

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Times are samples of how long something took.
type Times []time.Duration

// At returns a percentile.
func (t Times) At(percent int) time.Duration {
	if len(t) == 0 {
		return 0
	}
	t = slices.Sorted(slices.Values(t))
	return t[(len(t)-1)*percent/100]
}

// MS is a duration for people.
func MS(d time.Duration) string {
	if d >= 10*time.Second {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}

// Ratio is of two durations; "-" if there is none.
func Ratio(a, b time.Duration) string {
	if a == 0 || b == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", float64(a)/float64(b))
}

// Table prints rows below a heading, each column as wide as it has to be.
func Table(title string, rows ...[]string) {
	fmt.Printf("\n%s\n", title)
	width := map[int]int{}
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], len(cell))
		}
	}
	for _, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			fmt.Fprintf(&line, "%-*s  ", width[i], cell)
		}
		fmt.Println(strings.TrimRight(line.String(), " "))
	}
}
