package fsck

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"varve.dev/layout"
)

// Finding is one broken invariant on one object.
type Finding struct {
	Invariant string          `json:"invariant"` // number in package layout
	Severity  layout.Severity `json:"severity"`
	Object    string          `json:"object"`              // "layer 0123…", "blob sha256:…"
	Path      string          `json:"path,omitempty"`      // in the store; for L4 in the layer's tree
	PathBytes []byte          `json:"pathBytes,omitempty"` // a path that is not UTF-8, which JSON cannot carry
	Detail    string          `json:"detail"`              // what is there instead
	Repair    string          `json:"repair"`              // what would make it hold again
	// Healed: it was found before the store was opened, and holds since.
	Healed bool `json:"healed,omitempty"`
}

// same tells whether two findings are of one thing, whatever was seen there.
func (f Finding) same(g Finding) bool {
	return f.Invariant == g.Invariant && f.Object == g.Object && f.Path == g.Path
}

// Report is what a check found. Its JSON is stable: fields are only added.
type Report struct {
	Root     string       `json:"root"`
	Level    layout.Level `json:"level"`
	Of       []string     `json:"of,omitempty"`     // what was chosen; nothing: the store
	Sample   float64      `json:"sample,omitempty"` // share of the contents that was read; 0: all
	Draw     uint64       `json:"draw,omitempty"`   // what the sample was drawn by
	Findings []Finding    `json:"findings"`         // by invariant, object and path
	Blobs    int          `json:"blobs"`            // recorded ones, of those chosen
	Layers   int          `json:"layers"`           // recorded ones
	Files    int64        `json:"files"`            // names in layers, compared with their manifests (deep)
	Bytes    int64        `json:"bytes"`            // read and hashed (deep)
	Started  time.Time    `json:"started"`
	Resumed  time.Time    `json:"resumed,omitzero"` // when one that was cut off went on
	Finished time.Time    `json:"finished"`
}

// Has tells whether the report has a finding of the same thing.
func (r *Report) Has(f Finding) bool { return slices.ContainsFunc(r.Findings, f.same) }

// AddBefore adds what an earlier report has found of the store before it was
// opened: recovery carries out what was under way, and a database that is
// damaged is made again. What is not found any more was healed by that.
func (r *Report) AddBefore(earlier *Report) {
	for _, f := range earlier.Findings {
		if r.Has(f) {
			continue
		}
		f.Healed = true
		r.Findings = append(r.Findings, f)
	}
	r.sort()
}

// AddLost adds what a database that was made again has lost.
func (r *Report) AddLost(what []string) {
	inv, _ := layout.FindInvariant("M2")
	for _, w := range what {
		r.Findings = append(r.Findings, Finding{
			Invariant: inv.ID, Severity: inv.Severity, Object: theDatabase, Path: layout.DatabaseFile,
			Detail: "it was made again, and lost: " + w, Repair: "none: what it was is kept in " + layout.DamagedFile,
		})
	}
	r.sort()
}

func (r *Report) sort() {
	slices.SortStableFunc(r.Findings, func(a, b Finding) int {
		return strings.Compare(a.Invariant+"\x00"+a.Object+"\x00"+a.Path, b.Invariant+"\x00"+b.Object+"\x00"+b.Path)
	})
}

// Record is what is kept of a deep check that came to its end.
func (r *Report) Record() layout.CheckRecord {
	rec := layout.CheckRecord{Started: r.Started, Finished: r.Finished, Of: r.Of, Sample: r.Sample, Files: r.Files, Bytes: r.Bytes}
	for _, f := range r.Findings {
		if f.Severity != layout.Notice {
			rec.Findings++
		}
		if f.Severity == layout.Loss {
			rec.Losses++
		}
	}
	return rec
}

// ExitCode is 0 for a clean store, 1 if everything found is healed or can be
// repaired from what is there, 2 if something acknowledged is lost or wrong.
// Notices do not count. 3, for a check that could not run, is the caller's.
func (r *Report) ExitCode() int {
	code := 0
	for _, f := range r.Findings {
		switch {
		case f.Severity == layout.Notice:
		case f.Severity == layout.Loss && !f.Healed:
			return 2
		default:
			code = 1
		}
	}
	return code
}

// WriteText writes the report for people: each finding with its repair, and
// one line that sums up.
func (r *Report) WriteText(w io.Writer) {
	notices := 0
	for _, f := range r.Findings {
		at := ""
		if f.Path != "" {
			at = " at " + printable(f.Path)
		}
		if f.Severity == layout.Notice {
			notices++
		}
		next := "repair: " + f.Repair
		if f.Healed {
			next = "healed when the store was opened"
		}
		fmt.Fprintf(w, "%s %s: %s%s: %s\n    %s\n", f.Invariant, f.Severity, f.Object, at, f.Detail, next)
	}
	verdict := "clean"
	if n := len(r.Findings) - notices; n > 0 {
		verdict = fmt.Sprintf("%d findings", n)
	}
	if notices > 0 {
		verdict += fmt.Sprintf(", %d notices", notices)
	}
	what := string(r.Level)
	if r.Sample > 0 {
		what += fmt.Sprintf(", contents of %g%%", r.Sample*100)
	}
	if len(r.Of) > 0 {
		what += " of " + strings.Join(r.Of, ", ")
	}
	fmt.Fprintf(w, "fsck %s: %s: %d blobs, %d layers", what, verdict, r.Blobs, r.Layers)
	if r.Level == layout.Deep {
		fmt.Fprintf(w, ", %d files, %d bytes read", r.Files, r.Bytes)
	}
	fmt.Fprintf(w, ", %.1fs\n", r.Finished.Sub(r.Started).Seconds())
}

// printable keeps what a layer calls its files from moving a terminal's
// cursor.
func printable(s string) string {
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return fmt.Sprintf("%q", s)
		}
	}
	return s
}
