package layout

import (
	"fmt"
	"io"
)

// Print writes docs/FORMAT.md: the format as it is defined by the values of
// this package.
func Print(w io.Writer) {
	p := func(format string, args ...any) { fmt.Fprintf(w, format, args...) }
	p("# The format of a store, version %d\n\n", FormatVersion)
	p("Printed from package `layout` by `go test ./layout -update`; a test compares the two.\n\n")
	p("## Directories\n\n| path | mode | meaning |\n|---|---|---|\n| `%s` | 0600 | all metadata, a bbolt database |\n| `%s` | 0600 | the change log |\n", DatabaseFile, LogFile)
	for _, d := range Dirs() {
		if d.Meaning != "" {
			p("| `%s/` | %04o | %s |\n", d.Path, d.Perm, d.Meaning)
		}
	}
	p("\nEverything belongs to root. The change log has a line for each commit: CRC-32C of the JSON in hex, a space, the JSON; the structs are in `layout/records.go`. After damage there are `%s` and `%s`, too.\n", SuspectFile, DamagedFile)
	p("\nA blob stands at `%s`, a layer's tree at `%s/%s`, a writable layer at `%s/{%s,%s}`, an unfinished blob at `%s/{%s,%s}`.\n\n",
		BlobPath("sha256:abcd…"), LayerPath("<id>"), TreeDir, ActivePath("<id>"), TreeDir, WorkDir, IngestPath("<id>"), IngestData, IngestInfo)
	p("## Database\n\nBuckets: ")
	for i, b := range Buckets() {
		if i > 0 {
			p(", ")
		}
		p("`%s`", b)
	}
	p(".\n\nA value is the CRC-32C (big-endian) of its key and JSON, then the JSON; the records are the structs of `layout/records.go`. ")
	p("An edge is a key without a value: child, relation and parent with NUL between them in `%s`, parent first in `%s`.\n\n", BucketEdges, BucketEdgesBack)
	p("The sequence of each bucket is the sum, modulo 2⁶⁴, of the FNV-1a (64 bits) of each of its entries: the key and the first %d bytes of the value.\n\n", checksumLen)
	p("## File manifest\n\nA continuity `Manifest` message, one resource for each inode, in the order of the first names; the root directory is `.`. ")
	p("What the message has no field for stands in xattrs that no file can have: `varve.dev/mtime` (nanoseconds, decimal), and `varve.dev/names` (separated by NUL) and `varve.dev/target` where these are not UTF-8. ")
	p("Of overlayfs's own xattrs only `trusted.overlay.opaque` is listed; those by which a mount would show something else (`redirect`, `metacopy`, `whiteout`) may not be there, others are notes. A whiteout is a character device 0/0. Sockets are not listed: no archive can carry them.\n\n")
	p("## Invariants\n\nThey hold whenever no operation is under way, and after recovery from any crash.\n\n| id | severity | level | what holds | repair |\n|---|---|---|---|---|\n")
	for _, i := range Invariants() {
		p("| %s | %s | %s | %s | %s |\n", i.ID, i.Severity, i.Level, i.Holds, i.Repair)
	}
	p("\n## Transitions\n\nEvery state that can be seen after a crash, what recovery does, and the fault point that stops a writer there.\n\n| id | operation | seen | direction | recovery | fault point |\n|---|---|---|---|---|---|\n")
	for _, t := range Transitions() {
		p("| %s | %s | %s | %s | %s | `%s` |\n", t.ID, t.Operation, t.Seen, t.Direction, t.Recovery, t.Point)
	}
}
