// Package content is the blobs of a store: immutable bytes under their
// sha256, and the ingests from which they come.
//
// Owns blobs/ and ingest/. It must not know what the bytes mean: manifests,
// layers and file manifests are all blobs to it.
//
// Invariants kept: B1 to B5 and N1. A blob gets its name only after digest and
// size were verified and its bytes are durable; it is never changed afterwards
// (mode 0444). An ingest is found again by its reference after a crash: the
// next writer hashes what is there and goes on behind it, so nothing of it has
// to be durable; bytes that a power cut tore show as a wrong digest, upon
// which the ingest starts again from nothing.
//
// [Store] implements containerd's core/content.Store for callers that commit
// blob by blob. An image's blobs are published together instead, with one
// barrier and one transaction: see [Ingest.Seal].
//
// Concurrency: any number of readers; one writer for each reference, a second
// gets ErrUnavailable. Crash story: transitions T-N1 to T-N3, then those of
// package journal.
//
// Start reading at ingest.go, then store.go.
package content
