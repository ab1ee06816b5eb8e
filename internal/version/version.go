// Package version holds the version of this build, set by the linker.
package version

// Version is the tag or commit that the binaries were built from.
var Version = "unknown"
