package testkit

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// cacheVariable names a folder for the made images instead of the user's
// cache folder.
const cacheVariable = "VARVE_FIXTURES"

// CacheDir is where made images are kept between runs.
func CacheDir() (string, error) {
	if dir := os.Getenv(cacheVariable); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		// No HOME, as under some build services: a folder that survives
		// reboots and is not in memory.
		dir = "/var/tmp"
	}
	return filepath.Join(dir, "varve-fixtures"), nil
}

// cached returns the image that build makes, from the cache if some process
// made it before with the same inputs. inputs are everything that the bytes
// depend on; whoever changes a recipe changes the recipe's number in them.
func cached(name string, inputs []string, build func(*Layout) (Image, error)) (Image, error) {
	root, err := CacheDir()
	if err != nil {
		return Image{}, err
	}
	sum := sha256.Sum256([]byte(strings.Join(inputs, "\x00")))
	final := filepath.Join(root, name+"-"+hex.EncodeToString(sum[:8]))
	if img, err := Open(final); err == nil {
		return img, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return Image{}, err
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return Image{}, err
	}
	tmp, err := os.MkdirTemp(root, ".making-"+name+"-*")
	if err != nil {
		return Image{}, err
	}
	defer os.RemoveAll(tmp)
	l, err := NewLayout(tmp)
	if err != nil {
		return Image{}, err
	}
	if _, err := build(l); err != nil {
		return Image{}, fmt.Errorf("make image %s: %w", name, err)
	}
	// Two processes may make the same one at once. The rename of the slower
	// fails on a folder that is not empty; what is there is then as good.
	if err := os.Rename(tmp, final); err != nil && !errors.Is(err, fs.ErrExist) {
		return Image{}, err
	}
	return Open(final)
}

// Copy returns a copy of the image in dir that may be changed.
func (img Image) Copy(dir string) (Image, error) {
	if err := os.CopyFS(dir, os.DirFS(img.Dir)); err != nil {
		return Image{}, err
	}
	return Open(dir)
}

// Need ends the test with a clear word when a program is missing.
func Need(t testing.TB, program, debianPackage string) {
	t.Helper()
	if err := need(program, debianPackage); err != nil {
		t.Fatal(err)
	}
}

func need(program, debianPackage string) error {
	if _, err := exec.LookPath(program); err != nil {
		return fmt.Errorf("%s is not installed: apt-get install %s: %w", program, debianPackage, err)
	}
	return nil
}

// NeedRoot skips the test when it does not run as root, or fails it when
// REQUIRE_ROOT=1 says that it has to.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_ROOT") == "1" {
		t.Fatal("REQUIRE_ROOT=1, but this is not root")
	}
	t.Skip("needs root")
}

func must(t testing.TB, img Image, err error) Image {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return img
}
