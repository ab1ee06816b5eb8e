package main

import (
	"bytes"
	"fmt"
	"slices"
)

// The drawing, in pixels: one panel below the other.
const (
	left, width   = 70, 640
	height, apart = 130, 190
	colours       = 2
)

// plot draws each curve of each engine over the builds.
func plot(o options, engines []*engine) []byte {
	var b bytes.Buffer
	all := curves()
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", left+width+20, len(all)*apart+20)
	fmt.Fprintln(&b, `<rect width="100%" height="100%" fill="white"/>`)
	for i, c := range all {
		limit := int64(promised)
		if i == len(all)-1 {
			limit = o.cap
		}
		panel(&b, i*apart+40, c, engines, limit)
	}
	fmt.Fprintln(&b, "</svg>")
	return b.Bytes()
}

// panel draws one curve of each, as high as the highest, and what is promised as a
// dashed line if that is not far above.
func panel(b *bytes.Buffer, top int, c curve, engines []*engine, limit int64) {
	most := int64(0)
	for _, e := range engines {
		most = max(most, slices.Max(e.each(c.of)))
	}
	y := func(v int64) float64 { return float64(top+height) - float64(height)*float64(v)/float64(most) }
	n := len(engines[0].builds)
	fmt.Fprintf(b, `<text x="%d" y="%d"><tspan font-weight="bold">%s</tspan> (promised: %.0f MiB)</text>`+"\n", left, top-12, c.name, inMiB(limit))
	for i, e := range engines {
		fmt.Fprintf(b, `<text x="%d" y="%d" fill="%s">%s</text>`+"\n", left+400+100*i, top-12, colour(i), e.name)
	}
	for _, v := range []int64{0, most / 2, most} {
		fmt.Fprintf(b, `<path d="M%d %.1fh%d" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%.0f MiB</text>`+"\n", left, y(v), width, left-6, y(v)+4, inMiB(v))
	}
	if limit <= most {
		fmt.Fprintf(b, `<path d="M%d %.1fh%d" stroke="#888" stroke-dasharray="6 4"/>`+"\n", left, y(limit), width)
	}
	for i, e := range engines {
		fmt.Fprintf(b, `<polyline fill="none" stroke="%s" points="`, colour(i))
		for x, v := range e.each(c.of) {
			fmt.Fprintf(b, "%.1f,%.1f ", left+float64(x)*width/float64(max(n-1, 1)), y(v))
		}
		fmt.Fprintln(b, `"/>`)
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end">build %d</text>`+"\n", left+width, top+height+16, n)
}

func colour(i int) string { return [colours]string{"#0a6", "#c40"}[i%colours] }
