// Package buildkit serves BuildKit's Control and gateway services, so that
// buildctl, buildx and whatever else speaks with a buildkitd use varve's builder
// unmodified.
//
// Owns no data; what was built is kept for a while in memory, to be told of. It
// must not decide anything about stores: it translates BuildKit's requests into
// [Backend] calls.
//
// Start reading at control.go, then progress.go and gateway.go.
package buildkit
