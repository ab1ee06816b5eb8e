package archtest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// writers are the packages whose files are the store's.
var writers = []string{"metadata", "journal", "content", "layer", "snapshotter", "image", "runtime/containers"}

// doors are the calls that only package durable makes.
var doors = map[string]bool{
	"os.Rename": true, "os.Create": true, "os.OpenFile": true, "os.WriteFile": true, "os.Remove": true, "os.RemoveAll": true,
	"os.Mkdir": true, "os.MkdirAll": true, "os.MkdirTemp": true, "os.CreateTemp": true, "os.Link": true, "os.Symlink": true, "os.Truncate": true,
	"os.Chmod": true, "os.Chown": true, "os.Lchown": true, "os.Chtimes": true,
	"unix.Rename": true, "unix.Renameat2": true, "unix.Fsync": true, "unix.Fdatasync": true, "unix.Syncfs": true, "unix.Mknod": true,
}

// exceptions are calls that do not touch the store, with the reason.
var exceptions = map[string]string{
	"metadata/open.go os.OpenFile":  "the database's own file, which bbolt writes and syncs",
	"layer/walk.go os.OpenFile":     "opens for reading, without following links",
	"layer/resolve.go os.OpenFile":  "opens for reading, without following links",
	"image/archive.go os.MkdirAll":  "writes an OCI layout into the caller's own folder",
	"image/archive.go os.Create":    "writes an OCI layout into the caller's own folder",
	"image/archive.go os.OpenFile":  "writes an OCI layout into the caller's own folder",
	"image/archive.go os.WriteFile": "writes an OCI layout into the caller's own folder",
}

func TestOneDoorToDurability(t *testing.T) {
	for _, pkg := range writers {
		dir := filepath.Join("../..", pkg)
		err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
				return err
			}
			file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				sel, ok := n.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				base, ok := sel.X.(*ast.Ident)
				if !ok {
					return true
				}
				call := base.Name + "." + sel.Sel.Name
				at := pkg + "/" + filepath.Base(name) + " " + call
				if doors[call] && exceptions[at] == "" {
					t.Errorf("%s: only package durable may", at)
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
