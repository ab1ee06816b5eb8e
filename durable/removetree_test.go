package durable

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A tree of everything that can be in one goes, and can be cut off anywhere.
func TestRemoveTree(t *testing.T) {
	root, err := Create(t.TempDir(), 0o711)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	tree := root.Path("trash")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	outside := filepath.Join(t.TempDir(), "outside")
	must(os.WriteFile(outside, []byte("stays"), 0o600))
	deep := tree
	for range 40 { // longer than a path may be
		deep = filepath.Join(deep, strings.Repeat("d", 60))
	}
	must(os.MkdirAll(deep, 0o700))
	for i := range 1000 {
		must(os.WriteFile(filepath.Join(tree, fmt.Sprint("file", i)), nil, 0))
	}
	must(os.Symlink(filepath.Dir(outside), filepath.Join(tree, "link")))
	must(unix.Mkfifo(filepath.Join(deep, "fifo"), 0))
	must(os.Chmod(deep, 0))

	stop, n := errors.New("stop"), 0
	for cut := 1; ; cut *= 3 {
		n = 0
		err := root.RemoveTree("trash", func() error {
			if n++; n > cut {
				return stop
			}
			return nil
		})
		if err == nil {
			break
		}
		if !errors.Is(err, stop) {
			t.Fatal(err)
		}
		if _, err := os.Lstat(tree); err != nil {
			t.Fatalf("cut off after %d: %v", cut, err)
		}
	}
	if _, err := os.Lstat(tree); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the tree is still there: %v", err)
	}
	if _, err := os.Lstat(outside); err != nil {
		t.Errorf("what a link led to is gone: %v", err)
	}
	// What is not there, and what is no directory.
	must(root.RemoveTree("trash", func() error { return nil }))
	must(os.WriteFile(tree, nil, 0o400))
	must(root.RemoveTree("trash", func() error { return nil }))
	if _, err := os.Lstat(tree); err == nil {
		t.Error("the file is still there")
	}
}
