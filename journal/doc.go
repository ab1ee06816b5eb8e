// Package journal carries out the changes that touch both the database and
// the files: publications, removals, and the recovery of either after a crash.
//
// Owns the order of writes, and with it the states of
// layout.Transitions("publish", "remove", "prepare", "unpack"); the names in
// trash and staging. It must not know what a layer holds or where a blob came
// from.
//
// A publication is a layout.IntentRecord whose files are finished under
// temporary names. [Journal.Publish] makes their contents durable (one
// barrier), writes the intent, renames, makes the names durable (one flush),
// and writes the records. From the intent on there is no way back: whatever
// interrupts it, recovery finishes it. A removal runs the other way round: the
// record goes first, with a sweep row in the same transaction, then the files
// are renamed to the trash and deleted in the background.
//
// The race between the two, a blob that is being swept and published again,
// is decided in the database: a publication takes an unclaimed sweep back, waits
// while the files of a claimed one are renamed away, and does not wait for the
// deleting, which is paced; a sweep is claimed only while nothing names its
// files.
//
// Invariants kept: B4, L2, T1, T2, G1, G2, J1.
//
// Concurrency: publications run beside each other and beside the sweeper. No
// lock is held across I/O.
//
// Crash story: see layout/transitions.go, row by row; [Open] is the recovery,
// its work in proportion to what was under way, and it may be interrupted and
// run again.
//
// Start reading at publish.go, then recover.go, then sweep.go.
package journal
