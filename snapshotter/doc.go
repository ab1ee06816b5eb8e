// Package snapshotter is the overlay2 snapshots of a store: named places in a
// tree of immutable layers, on which writable ones are prepared.
//
// Owns layers/ and active/. It must not know of images or containers; it is
// told what holds a snapshot alive.
//
// Vocabulary, as in containerd: an active snapshot is writable and has a
// directory of its own; a committed one is immutable, named by its caller and
// stands for a layer on top of its parent's; a view is a read-only look at a
// committed one. Several committed snapshots may share one layer's tree, since
// layers are unpacked without their parents.
//
// Example: Prepare("work", parent) → mount what it returns, write, unmount →
// Commit("result", "work") → Prepare("next", "result").
//
// Invariants kept: L1 to L6 and S1 to S4. A layer is recorded only after its
// tree and its file manifest are durable.
//
// [Snapshotter] implements containerd's core/snapshots.Snapshotter, whose
// snapshots are roots until their Remove. varve's own packages name another
// holder: see [Snapshotter.PrepareFor].
//
// Concurrency: everything may run beside everything; two commits of one name
// end with one of them. Crash story: transitions T-A1 and T-A2, T-U1 and T-U2,
// then those of package journal.
//
// Start reading at snapshotter.go, then commit.go, then unpack.go, then
// mounts.go.
package snapshotter
