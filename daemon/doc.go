// Package daemon opens a store, recovers it, wires the packages below into one
// [Engine], serves it on a socket and shuts it down.
//
// Owns the sockets under the state directory. It must have no logic of its
// own: what it does more than pass calls on belongs into one of the packages
// below.
//
// The same [Keeper] stands behind `varve daemon` and behind a single command
// that finds no daemon ("embedded"): see [Join]. It has the store open as an
// Engine, and opens it again when its database turns out damaged.
//
// Concurrency: both may be used by many goroutines. Crash story: none of its
// own; opening a store recovers it, closing one is only polite.
//
// Start reading at engine.go, then keeper.go, then serve.go, then join.go.
package daemon
