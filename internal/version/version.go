// Package version holds the version of this build, set by the linker.
package version

import "runtime/debug"

// Version is the tag or commit that the binaries were built from.
var Version = "unknown"

// BuildKit is the version of the BuildKit modules in this build, whose clients
// ask for it to know what can be done.
func BuildKit() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Path == "github.com/moby/buildkit" {
				return m.Version
			}
		}
	}
	return "unknown"
}
