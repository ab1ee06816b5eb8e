// Package durable is the one door to permanence: only it creates, renames,
// syncs or removes files inside a store.
//
// Every method states what is true after nil and after an error. In short:
// after nil from a method that says "durable", the thing survives a power cut;
// after an error nothing is half there, or what is half there has a name that
// recovery throws away (staging, ingest, trash). A failed sync poisons the
// [Root]: the kernel may have dropped the pages it could not write and marked
// them clean, so a later sync that succeeds would prove nothing. A poisoned
// Root answers every change with errdefs.ErrPoisoned and is never revived.
//
// Owns no name on disk but the barrier's marker file; all other names come
// from the caller, relative to the root, and may not leave it. It must not
// know what a blob, a layer or a database is.
//
// Concurrency: everything may be called from many goroutines; a [File], a
// [Tree] and a [Barrier] belong to one goroutine each unless they say
// otherwise.
//
// Crash story: rename is atomic and comes after the data is durable; a
// directory is synced after the names in it changed; the barrier makes many
// files durable with a number of flushes that does not grow with them.
// docs/design/0001-order-of-writes.md has the measurements per file system.
//
// For tests there are named fault points ([At]) and an observer of every
// change ([Observer]), from which package durable/crashsim builds the states
// that a power cut could leave.
//
// Start reading at root.go, then barrier.go, then tree.go.
package durable
