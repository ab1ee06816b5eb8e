// Package testkit makes the real things that tests, benchmarks and the demo
// work on: container images, a registry, and a registry that misbehaves.
//
// Start reading at [StartRegistry], then [Busybox] and layerbuilder.go, which
// every image is made with.
//
//   - [StartRegistry] runs Debian's docker-registry on loopback.
//   - [Busybox], [Debian], [Awkward] and [Big] are images as OCI layouts,
//     the same bytes each time, made once and kept in a cache directory.
//   - [Image.Push] puts one into a registry with the few requests that the
//     distribution specification asks for.
//   - [Proxy] stands before a registry and lies, cuts, stalls or refuses.
//
// What it owns: folders under [CacheDir], each published by one rename and
// never changed afterwards, so any number of test processes may share them.
// A folder that is there is complete; a crash leaves at most a temporary
// folder beside it.
//
// What it must not know: any other package of varve. It is the witness that
// the packages under test are compared with, so it makes its tar streams,
// digests and requests by itself.
//
// Concurrency: everything may be called from several goroutines, except that
// one [Proxy]'s rules are set before or between requests by its owner.
package testkit
