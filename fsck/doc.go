// Package fsck is the independent witness: it holds a store against every
// invariant of package layout, one check for each number, and says what it
// found. It changes nothing.
//
// It imports none of the packages that write: it shares with them the law in
// layout and nothing else, and reads the database, the directories and the
// file manifests (a continuity Manifest message) with code of its own.
//
// Offline it opens varve.db read-only. Online it is given the open database
// and holds no lock while it reads; what changes under it is looked at again
// before it is reported, and what an open intent, a sweep or a lease names is
// under way, not wrong.
//
// A database that damage makes panic or fault is a finding, never a crash.
//
// Memory: the records' names and sizes, and at level deep one file manifest
// for each worker.
//
// Start reading at fsck.go, then records.go for what is loaded, then the
// checks: database.go, files.go, references.go, deep.go.
package fsck
