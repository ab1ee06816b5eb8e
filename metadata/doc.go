// Package metadata is the one bbolt database of a store, with typed
// transactions over the records and reference edges of package layout.
//
// Owns varve.db and the change log beside it, varve.log. It must not know what
// the records mean to the packages above it, and does no file I/O but bbolt's
// own and the log's: what covers both database and files is package journal.
// The exception is rebuild.go, which looks what stands on disk.
//
// Invariants kept here: M1 to M3 (every value checksummed, every bucket there,
// keys that parse), M4 (the change log), M5 (every bucket has the sum of its
// entries), E1 (edges in both directions), L5 (the layer index), and,
// for what [Tx.Unlink] leaves unreferenced, E4: it goes in the same
// transaction, with a sweep row for its files. E5 and A1 (accounts.go): what is
// in use, and what everything takes, are booked as they change.
//
// Concurrency: any number of views beside one commit. Updates from many
// goroutines that arrive while a commit is being written share the next one,
// so thirty-two callers pay for a few syncs, not for thirty-two; each still
// gets its own error, and an update that fails takes nothing of the others
// with it.
//
// Crash story: bbolt's commit is atomic and synced; NoSync is set only in a copy
// that has no name yet. The database is created under a temporary name and
// published, and so is the copy that takes its place (compact.go). A commit
// whose sync failed poisons the store's durable.Root. Damage in a page shows
// as a panic or a memory fault inside bbolt: both are caught at the
// transaction and come back as errdefs.Corrupt. What is no longer there shows
// when the pages are read in full: at opening, and now and then while the
// database is open. Whoever has it open is told ([DB.Damaged]); the next Open
// with Options.Rebuild makes a new database from the change log.
//
// Start reading at db.go, then tx.go, then refs.go, then changelog.go, then
// check.go, then compact.go.
package metadata
