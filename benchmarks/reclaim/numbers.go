package main

import (
	"fmt"
	"slices"
	"time"
)

// timed is how long fn takes.
func timed(fn func() error) (time.Duration, error) {
	begin := time.Now()
	err := fn()
	return time.Since(begin), err
}

// at is a percentile.
func at(p int, all []time.Duration) time.Duration {
	if len(all) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(all))
	return sorted[min(len(sorted)-1, len(sorted)*p/100)]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

// both are the two percentiles that the tables have.
func both(all []time.Duration) string { return ms(at(50, all)) + "  " + ms(at(99, all)) }

// ratio is of percentiles. Of fewer than a hundred the 99th is the longest, which
// is what an engine shows that makes nothing meanwhile.
func ratio(p int, all, to []time.Duration) string {
	if len(all) == 0 || at(p, to) == 0 {
		return "n/a"
	}
	return fmt.Sprintf("%.2f", float64(at(p, all))/float64(at(p, to)))
}
