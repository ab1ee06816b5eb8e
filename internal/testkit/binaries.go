package testkit

import (
	"fmt"
	"os"
	"os/exec"
	"sync"
	"testing"
)

// Binaries returns a folder with varve and varve-runtime as `make build` makes
// them. They are built once in a test program, which calls [RemoveBinaries]
// when it ends.
func Binaries(t testing.TB) string {
	t.Helper()
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// RemoveBinaries takes the folder of [Binaries] away. It is for TestMain.
func RemoveBinaries() {
	if binariesDir != "" {
		os.RemoveAll(binariesDir)
	}
}

var binariesDir string

var binaries = sync.OnceValues(func() (dir string, err error) {
	if binariesDir, err = os.MkdirTemp("", "varve-bin-"); err != nil {
		return "", err
	}
	out, err := exec.Command("go", "build", "-tags", "seccomp", "-o", binariesDir+"/", "varve.dev/cmd/varve", "varve.dev/cmd/varve-runtime").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build varve: %w: %s", err, out)
	}
	return binariesDir, nil
})
