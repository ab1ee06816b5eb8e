// Package builder answers BuildKit's requests: a frontend, its own or one in a
// container, or the client itself makes graphs of operations (LLB), the solver
// here carries out what of them is not known yet, and exporters write the result.
//
// Owns the build cache's records and cachemounts/. It must not know of
// sockets or terminals.
//
// Every vertex gets a definition key, the hash of its operation and of its
// inputs' canonical keys. What the store has under the key is the result, and
// nothing below the vertex is touched. Otherwise the inputs are solved, in
// parallel; a copy is looked up once more by the contents of what it copies,
// which the layers' file manifests tell without reading a tree, and on a hit
// the definition key becomes an alias. Otherwise the operation runs, and its
// result, a committed snapshot, is stored under both keys in the transaction
// that commits it. keys.go says what goes into a key.
//
// The same key is worked on once at a time, whatever number of builds want it.
// A cancelled build kills its running steps with everything they started; what
// they had written goes with the lease that held it.
//
// Who asked for a reference and what it is made from is told from traces and
// from the graphs when the build is over, and becomes provenance; see trace.go
// and provenance.go.
//
// Crash story: a result is recorded in the publication of its layer or not at
// all; see package journal.
//
// Start reading at build.go and gateway.go, then solve.go, then keys.go, then the
// operations: source.go with what it begins from (local.go, http.go, git.go, …),
// run.go, file.go, and exporter.go.
package builder
