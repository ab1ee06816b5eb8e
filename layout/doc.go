// Package layout is the law of a varve store: every path, bucket, key, record,
// numbered invariant and transition, in constants and words, without I/O.
//
// It is read by the writers (metadata, journal, content, snapshotter) and by
// the witness (fsck), which share nothing else. docs/FORMAT.md is printed from
// the values here; a test compares the two.
//
// An [Invariant]'s number names the check in fsck, the test that breaks it by
// hand, and the sentence in docs/FORMAT.md. A [Transition] is a state that can
// be seen after a power cut, with the direction recovery takes from it and the
// fault point that stops a writer there.
//
// Start reading at invariants.go, then transitions.go, then records.go.
package layout
