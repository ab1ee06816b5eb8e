// Command varve-runtime is the shim of one container: it mounts, starts,
// waits, records the exit and cleans up. It is small so that starting a
// container does not pay for the rest of varve; it is also the container's
// init until that becomes the container's own program.
//
//	varve-runtime run [--step] DIR
//
// DIR is the container's directory with its config.json, where its exit.json
// goes. With --step it is an empty one, and the descriptors from 3 on are those
// of [runtime.StepLifeline]: a lifeline at whose end the container is killed,
// its config, and where its exit goes. The exit code is the container's.
//
// Start reading at run.go, then rootfs.go and spec.go.
package main

import (
	"errors"
	"fmt"
	"os"

	_ "github.com/opencontainers/cgroups/devices" // device rules of a container
	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // libcontainer's first stage, in C
	"github.com/opencontainers/runc/libcontainer/seccomp"

	"varve.dev/runtime"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		libcontainer.Init() // never returns
	}
	code, err := command(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "varve-runtime:", err)
	}
	os.Exit(code)
}

func command(args []string) (int, error) {
	if !seccomp.Enabled {
		return runtime.CodeRuntime, errors.New("built without seccomp (build tag \"seccomp\"): refusing to run containers without it")
	}
	usage := errors.New("usage: varve-runtime run [--step] DIR")
	if len(args) < 2 || args[0] != "run" {
		return runtime.CodeRuntime, usage
	}
	step := args[1] == "--step"
	if step {
		args = args[1:]
	}
	if len(args) != 2 {
		return runtime.CodeRuntime, usage
	}
	if step {
		return runStep(args[1])
	}
	return run(args[1])
}
