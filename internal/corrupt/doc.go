// Package corrupt damages a closed store, one kind of damage at a time: a bit
// flips in a file, a blob goes missing, an edge points nowhere. It says what
// has to be found of it, by the numbers of docs/FORMAT.md.
//
// It stands for everything outside of varve that can damage a store, so it
// imports nothing of varve: what it knows of a store is what docs/FORMAT.md
// says, and how a report calls things is in docs/FSCK.md. The same kind and
// seed do the same to the same store.
//
// What it must not know: how damage is looked for, or healed. Two calls on one
// store must not overlap.
//
// Start reading at corrupt.go; the kinds are in the files named after what
// they damage.
package corrupt
