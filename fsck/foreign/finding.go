package foreign

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"varve.dev/layout"
)

// Kind is what is wrong with a file, a blob or a record.
type Kind string

// The kinds.
const (
	Missing Kind = "missing" // a record names it, and nothing is there
	Empty   Kind = "empty"   // 0 bytes, must be more
	Short   Kind = "short"   // fewer bytes than it must have
	Long    Kind = "long"    // more
	Altered Kind = "altered" // as many bytes, but others
	Type    Kind = "type"    // a file where a directory must be, and the like
	Mode    Kind = "mode"    // permission bits
	Owner   Kind = "owner"
	Time    Kind = "time"   // of modification
	Xattr   Kind = "xattr"  // extended attributes, overlayfs's mark of an opaque directory included
	Target  Kind = "target" // of a symbolic link
	Device  Kind = "device" // numbers of a device
	Link    Kind = "link"   // hard links: not the file that it must be, or one that it must not be
	Extra   Kind = "extra"  // it is there, and nothing names it
	Record  Kind = "record" // a record of the engine's that cannot be read, or contradicts another

	Unchecked Kind = "unchecked" // there is nothing to compare it with
	InUse     Kind = "in-use"    // the engine has the store open
)

// Finding is one thing that is not as it was recorded. Its JSON is stable:
// fields are only added.
type Finding struct {
	Kind     Kind            `json:"kind"`
	Severity layout.Severity `json:"severity"`         // loss, damage or notice
	Object   string          `json:"object"`           // "layer sha256:…", "blob sha256:…", "image …", "container …", "store"
	Images   []string        `json:"images,omitempty"` // names of the images that have it
	Path     string          `json:"path,omitempty"`   // below the store's directory
	File     string          `json:"file,omitempty"`   // in the image, for a file of a layer
	Detail   string          `json:"detail"`
	Repair   string          `json:"repair,omitempty"` // what would have it again
}

// Report is what a check found. Its JSON is stable: fields are only added.
type Report struct {
	Engine   Engine         `json:"engine"`
	Root     string         `json:"root"`
	Findings []Finding      `json:"findings"` // by object and path
	Omitted  int64          `json:"omitted"`  // findings that are counted and not listed
	Counts   map[Kind]int64 `json:"counts"`   // of all findings
	Images   int            `json:"images"`   // recorded ones
	Layers   int            `json:"layers"`   // compared with their records, or with their DiffIDs
	Blobs    int            `json:"blobs"`    // compared with their digests
	Files    int64          `json:"files"`    // names in layers that were compared
	Bytes    int64          `json:"bytes"`    // read and hashed
	Started  time.Time      `json:"started"`
	Finished time.Time      `json:"finished"`

	code int
}

func (r *Report) add(f Finding, limit int) {
	r.Counts[f.Kind]++
	switch f.Severity {
	case layout.Loss:
		r.code = 2
	case layout.Damage, layout.Leak:
		r.code = max(r.code, 1)
	}
	if len(r.Findings) >= limit {
		r.Omitted++
		return
	}
	r.Findings = append(r.Findings, f)
}

// ExitCode is 0 for a clean store, 1 if everything found can be had again from
// what the store has, or from the registry that it came from, 2 if something
// is lost. Notices do not count. 3, for a check that could not run, is the
// caller's.
func (r *Report) ExitCode() int { return r.code }

// WriteText writes the report for people: the findings of each object, what
// would have them again, and one line that sums up.
func (r *Report) WriteText(w io.Writer) {
	for rest := r.Findings; len(rest) > 0; {
		n := slices.IndexFunc(rest, func(f Finding) bool { return f.Object != rest[0].Object })
		if n < 0 {
			n = len(rest)
		}
		writeObject(w, rest[:n])
		rest = rest[n:]
	}
	if r.Omitted > 0 {
		fmt.Fprintf(w, "and %d findings more\n", r.Omitted)
	}
	fmt.Fprintf(w, "fsck of %s %s: %s: %d images, %d layers, %d blobs, %d files, %d bytes read, %.1fs\n",
		r.Engine, printable(r.Root), r.verdict(), r.Images, r.Layers, r.Blobs, r.Files, r.Bytes, r.Finished.Sub(r.Started).Seconds())
}

func (r *Report) verdict() string {
	if len(r.Counts) == 0 {
		return "clean"
	}
	var parts []string
	for _, kind := range slices.Sorted(maps.Keys(r.Counts)) {
		parts = append(parts, fmt.Sprintf("%d %s", r.Counts[kind], kind))
	}
	word := map[int]string{0: "clean", 1: "damaged", 2: "loss"}[r.code]
	return word + " (" + strings.Join(parts, ", ") + ")"
}

// writeObject writes the findings of one object, and each repair once.
func writeObject(w io.Writer, findings []Finding) {
	of := ""
	if names := findings[0].Images; len(names) > 0 {
		of = " of " + printable(strings.Join(names, ", "))
	}
	fmt.Fprintf(w, "%s%s\n", printable(findings[0].Object), of)
	var repairs []string
	for _, f := range findings {
		at := ""
		if f.File != "" {
			at = printable(f.File) + ": "
		} else if f.Path != "" {
			at = printable(f.Path) + ": "
		}
		fmt.Fprintf(w, "    %-9s %s%s\n", f.Kind, at, f.Detail)
		if f.Repair != "" && !slices.Contains(repairs, f.Repair) {
			repairs = append(repairs, f.Repair)
		}
	}
	for _, repair := range repairs {
		fmt.Fprintf(w, "    repair: %s\n", repair)
	}
}

// printable keeps what a layer calls its files from moving a terminal's
// cursor.
func printable(s string) string {
	if q := strconv.Quote(s); q != `"`+s+`"` {
		return q
	}
	return s
}
