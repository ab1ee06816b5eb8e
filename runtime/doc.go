// Package runtime is containers: what one is to be (a [Spec] in its
// directory), the shim that runs it, and what became of it.
//
// Owns containers/<id>: config.json, exit.json and the small files that are
// bound into the container. It must not know of images or builds, and imports
// nothing of libcontainer: that is in the small binary varve-runtime, one
// process for each container, which mounts, starts, waits and records by
// itself. The shim has a mount namespace of its own, so a container leaves
// nothing in the host's mount table, and it does not end with whoever started
// it.
//
// Concurrency: everything may be called from many goroutines. Crash story:
// config.json is there before the shim starts; exit.json is written durably by
// the shim before it ends, whether or not anybody waits for it.
//
// Start reading at spec.go, then shim.go, then cmd/varve-runtime.
package runtime
