// Package gc keeps a store within its limits: it decides what may go, has it
// removed, and tells what there is.
//
// Nothing is ever looked for that nobody needs: whatever loses its last
// reference goes in the transaction that takes it (package metadata), and its
// files after it (package journal). What is left to decide is what the build
// cache, the blobs that a registry can serve again and downloads that were cut
// off may keep. None of them is needed for what users named to be whole.
//
// Owns nothing on disk but the records of measures. Invariants kept: none of its
// own; every removal is a transaction that drops edges, and whoever takes a new
// reference does so in a transaction that finds what it refers to. It must not
// know of images or of builds, only of edges.
//
// Concurrency: one eviction at a time; limits are held by a budget that whoever
// writes asks before. Crash story: an eviction is a removal like any other.
//
// Start reading at limits.go, then space.go, then cache.go.
package gc
