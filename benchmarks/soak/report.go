package main

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
)

// promised is what varve's memory may come to.
const promised = 256 * mib

// report prints what was seen.
func report(o options, engines []*engine) {
	fmt.Printf("\n%d different builds, a store of at most %d MiB; slopes of the last %d builds with 95 %% confidence\n",
		len(engines[0].builds), o.cap/mib, last(len(engines[0].builds)))
	for _, e := range engines {
		took := e.each(func(s sample) int64 { return int64(s.took) })
		fmt.Printf("\n%s: a build took %.2f s (median), %.2f s at most\n", e.name, time.Duration(median(took)).Seconds(), time.Duration(slices.Max(took)).Seconds())
		for _, c := range curves() {
			values := e.each(c.of)
			fmt.Printf("  %-34s median %7.1f MiB   max %7.1f MiB   slope %s\n", c.name, inMiB(median(values)), inMiB(slices.Max(values)), fit(values))
		}
		over := slices.Max(e.each(store)) - o.cap
		fmt.Printf("  %d looks at the store, at most %.2f of the cap\n", e.eye.looks, float64(over+o.cap)/float64(o.cap))
	}
}

// curve is one of the things that are measured.
type curve struct {
	name string
	of   func(sample) int64
}

func heap(s sample) int64  { return s.heap }
func hwm(s sample) int64   { return s.hwm }
func store(s sample) int64 { return s.disk }

func curves() []curve {
	return []curve{
		{"heap after a collection", heap},
		{"VmRSS, children counted", func(s sample) int64 { return s.rss }},
		{"VmHWM, children counted", hwm},
		{"store", store},
	}
}

func (e *engine) each(of func(sample) int64) (values []int64) {
	for _, s := range e.builds {
		values = append(values, of(s))
	}
	return values
}

// broken are the promises that were not kept.
func (e *engine) broken(o options) error {
	var errs []error
	not := func(format string, args ...any) { errs = append(errs, fmt.Errorf("not kept: "+format, args...)) }
	for _, c := range []curve{{"heap", heap}, {"VmHWM", hwm}} {
		if most := slices.Max(e.each(c.of)); most > promised {
			not("%s is %.1f MiB", c.name, inMiB(most))
		}
	}
	if s := fit(e.each(heap)); s.perBuild-s.within > 0 {
		not("the heap grows: %s", s)
	}
	if most := slices.Max(e.each(store)); most > o.cap {
		not("the store takes %.1f MiB of %d", inMiB(most), o.cap/mib)
	}
	return errors.Join(errs...)
}

func median(values []int64) int64 {
	values = slices.Sorted(slices.Values(values))
	return values[len(values)/2]
}

// last is how many builds count for a slope, of n: in the first ones caches and
// the store fill.
func last(n int) int { return n * 3 / 5 }

// slope is in bytes per build: the true one is within that of perBuild with a
// confidence of 95 %.
type slope struct{ perBuild, within float64 }

func (s slope) String() string {
	return fmt.Sprintf("%+.2f ± %.2f KiB/build", s.perBuild/1024, s.within/1024)
}

// block is how many builds are taken together before a line is laid through them:
// neighbours have much in common, and would promise more confidence than there is.
const block = 10

// fit lays a line through the last builds by least squares.
func fit(values []int64) slope {
	values = values[len(values)-last(len(values)):]
	var means []float64
	for b := range slices.Chunk(values, block) {
		if len(b) < block {
			break
		}
		sum := 0.0
		for _, v := range b {
			sum += float64(v)
		}
		means = append(means, sum/block)
	}
	n := float64(len(means))
	if n < 5 {
		return slope{0, math.Inf(1)}
	}
	middle, level := (n-1)/2, 0.0
	for _, m := range means {
		level += m / n
	}
	var xx, xy, rest float64
	for i, m := range means {
		x := float64(i) - middle
		xx, xy = xx+x*x, xy+x*(m-level)
	}
	b := xy / xx
	for i, m := range means {
		r := m - level - b*(float64(i)-middle)
		rest += r * r
	}
	return slope{b / block, student(n-2) * math.Sqrt(rest/(n-2)/xx) / block}
}

// student is the 97.5th percentile of Student's t (Hill 1970, two terms more than
// the normal one's): for 28 degrees of freedom 2.048, for 10 2.228.
func student(freedom float64) float64 {
	const z = 1.959964
	return z + (z*z*z+z)/(4*freedom) + (5*math.Pow(z, 5)+16*z*z*z+3*z)/(96*freedom*freedom)
}
