// Package repair makes whole what fsck found damaged: it turns a report into a
// plan that can be printed, and carries it out while the store is in use.
//
// Owns quarantine/. It knows how things are made good; what is wrong is for
// package fsck to say, and whether it is good again, too: callers check again.
//
// What is healed comes from what proves itself: a file by the sum in its
// layer's file manifest, a blob by its digest. Sources are tried in this order:
// the store's own copies (a layer's blob, another layer with the same content,
// what memory has of a file that went bad on the disk, a tree that gives the same
// blob again), then the registry that a blob came from or went to. Nothing is deleted for being damaged: it moves to quarantine, with a
// note. What has no source stays damaged, is marked so that nothing uses it,
// and the images that it breaks are named; a pull of one of them heals it.
//
// A record that is lost while its files and what refers to it are there is made
// again first, so that nothing is dropped for its sake: restore.go.
//
// Running containers go on: see docs/design/0006-repair-under-containers.md
// for what they see, and holders.go for what is said of them.
//
// Invariants restored: those whose Repair, in package layout, is not "none".
//
// Concurrency: one repair at a time, beside everything else. Crash story: a
// file of a layer is bad or good, never in between, and what is not healed yet
// is found again; blobs and records go through package journal and its
// transitions.
//
// Start reading at plan.go, then tree.go, then sources.go.
package repair
