package archtest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// doors are the functions that change files or make them permanent. In the
// packages of the storeys only durable calls them. What has a method for it
// (Sync of an os.File) needs a file that one of these opened for writing.
var doors = map[string][]string{
	"os": {
		"Chmod", "Chown", "Chtimes", "CopyFS", "Create", "CreateTemp", "Lchown", "Link", "Mkdir", "MkdirAll", "MkdirTemp",
		"OpenFile", "Remove", "RemoveAll", "Rename", "Symlink", "Truncate", "WriteFile",
	},
	"golang.org/x/sys/unix": unixDoors,
	"syscall":               unixDoors,
}

var unixDoors = []string{
	"Chmod", "Chown", "Creat", "Fallocate", "Fchmod", "Fchmodat", "Fchown", "Fchownat", "Fdatasync", "Fsetxattr", "Fsync", "Ftruncate",
	"Lchown", "Link", "Linkat", "Lsetxattr", "Mkdir", "Mkdirat", "Mkfifo", "Mknod", "Mknodat", "Open", "Openat", "Openat2", "Pwrite",
	"Rename", "Renameat", "Renameat2", "Rmdir", "Setxattr", "Symlink", "Symlinkat", "Sync", "SyncFileRange", "Syncfs", "Truncate",
	"Unlink", "Unlinkat", "UtimesNanoAt",
}

// readFlags are what a call of Open or OpenFile may have and still only read.
var readFlags = []string{"O_RDONLY", "O_PATH", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_NOATIME", "O_CLOEXEC"}

// exceptions are calls that do not touch the store's files, or may, with the
// reason: "file function", "file" for all of one, or "package/".
var exceptions = map[string]string{
	"durable/":           "it is the door",
	"durable/crashsim/":  "writes crash images, in tests",
	"cmd/varve-runtime/": "makes a container's file system inside its mount namespace; never sees the store",

	"metadata/open.go os.OpenFile": "the database's own file, which bbolt writes and syncs",

	"fsck/reach/reach.go unix.Openat2": "its callers, in the same file, open for reading",
	"fsck/reach/reach.go os.OpenFile":  "the same",

	"builder/fileactions.go":        "writes into a mounted snapshot, as a container would; its commit hands every file to the barrier",
	"builder/http.go os.OpenFile":   "the same, for a file that was downloaded",
	"builder/http.go os.Chown":      "the same",
	"builder/http.go os.Chmod":      "the same",
	"builder/http.go os.Chtimes":    "the same",
	"builder/http.go os.CreateTemp": "a download, in the scratch folder under --state",
	"builder/http.go os.Remove":     "the same",
	"builder/external.go":           "what a frontend is told of itself, in the scratch folder under --state",
	"builder/secrets.go os.Remove":  "the folder that BuildKit's library made for an agent's socket",
	"builder/run.go":                "a step's hosts file and mount points, in the scratch folder under --state",
	"builder/cachemount.go":         "what a cache mount begins with, nothing that is promised to last",
	"builder/thread.go":             "mount points in the scratch folder under --state",
	"builder/gitcheckout.go":        "writes into a snapshot that is being made, whose commit hands every file to the barrier",
	"builder/gitcommand.go":         "the hosts that ssh knows, in the scratch folder under --state",
	"builder/gitrepo.go":            "a kept repository is a cache mount: nothing that is promised to last",

	"overlay/overlay.go os.Mkdir":      "the work folder of a writable mount, which is no part of the tree and gone before its commit",
	"runtime/shim.go os.MkdirTemp":     "a step's bundle, in the scratch folder under --state",
	"runtime/shim.go os.RemoveAll":     "the same",
	"daemon/scratch.go":                "the folder --state and the scratch folder in it",
	"daemon/serve.go":                  "the socket and its folder",
	"daemon/containers.go os.MkdirAll": "the source of a bind mount that the user named",

	"image/archive.go":       "writes an OCI layout into the caller's own folder",
	"cmd/varve/archive.go":   "writes an archive where the user said",
	"cmd/varve/build.go":     "writes an image's digest where the user said; a Dockerfile from standard input, gone after the build",
	"cmd/varve/buildkitd.go": "how to talk to registries, in the folder --state",
}

// use is one call of a door.
type use struct{ at, function string }

// uses finds the doors that a source file calls, under whatever name it
// imports their packages.
func uses(name string, src any) ([]use, error) {
	file, err := parser.ParseFile(token.NewFileSet(), name, src, 0)
	if err != nil {
		return nil, err
	}
	imported := map[string]string{}
	for _, i := range file.Imports {
		full := strings.Trim(i.Path.Value, `"`)
		local := path.Base(full)
		if i.Name != nil {
			local = i.Name.Name
		}
		imported[local] = full
	}
	var out []use
	if full, dot := imported["."]; dot && doors[full] != nil {
		out = append(out, use{name, "import of all names of " + full})
	}
	reading := map[ast.Node]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok && onlyReads(call) {
			reading[call.Fun] = true
		}
		sel, ok := n.(*ast.SelectorExpr)
		if !ok || reading[n] {
			return true
		}
		base, ok := sel.X.(*ast.Ident)
		if !ok || base.Obj != nil { // a variable of that name
			return true
		}
		full := imported[base.Name]
		if slices.Contains(doors[full], sel.Sel.Name) {
			out = append(out, use{name, path.Base(full) + "." + sel.Sel.Name})
		}
		return true
	})
	return out, nil
}

// onlyReads tells whether a call opens a file with flags that only read.
func onlyReads(call *ast.CallExpr) bool {
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	at, ok := map[string]int{"OpenFile": 1, "Open": 1, "Openat": 2}[sel.Sel.Name]
	if !ok || len(call.Args) <= at {
		return false
	}
	reads := true
	ast.Inspect(call.Args[at], func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectorExpr:
			reads = reads && slices.Contains(readFlags, n.Sel.Name)
			return false
		case *ast.Ident, *ast.CallExpr:
			reads = false // may be anything
		}
		return reads
	})
	return reads
}

func TestOneDoorToDurability(t *testing.T) {
	unused := maps.Clone(exceptions)
	for _, s := range storeys {
		for _, pkg := range s.packages {
			for _, u := range usesOfPackage(t, pkg) {
				allowed := false
				for _, at := range []string{u.at + " " + u.function, u.at, pkg + "/"} {
					allowed = allowed || exceptions[at] != ""
					delete(unused, at)
				}
				if !allowed {
					t.Errorf("%s %s: only package durable may", u.at, u.function)
				}
			}
		}
	}
	for at := range unused {
		t.Errorf("exception %q is for nothing", at)
	}
}

// usesOfPackage looks at the files of one package that are not tests.
func usesOfPackage(t *testing.T, pkg string) []use {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("../..", pkg, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	var out []use
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		found, err := uses(name, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range found {
			out = append(out, use{path.Join(pkg, filepath.Base(name)), u.function})
		}
	}
	return out
}

// The test above sees what it is meant to see.
func TestDoorsAreSeen(t *testing.T) {
	for src, want := range map[string]string{
		`import "os"; func f() { os.Rename("a", "b") }`:                                                          "os.Rename",
		`import x "os"; func f() { x.Create("a") }`:                                                              "os.Create",
		`import . "os"; func f() { Create("a") }`:                                                                "import of all names of os",
		`import "golang.org/x/sys/unix"; var f = unix.Renameat2`:                                                 "unix.Renameat2",
		`import "os"; func f() { os.OpenFile("a", os.O_RDWR|os.O_CREATE, 0) }`:                                   "os.OpenFile",
		`import "os"; func f(flags int) { os.OpenFile("a", flags, 0) }`:                                          "os.OpenFile",
		`import "os"; import "golang.org/x/sys/unix"; func f() { os.OpenFile("a", os.O_RDONLY|unix.O_PATH, 0) }`: "",
		`import "os"; func f() { os.Open("a"); os.Lstat("a") }`:                                                  "",
		`func f() { os := thing{}; os.Rename("a", "b") }`:                                                        "",
	} {
		found, err := uses("x.go", "package x; "+src)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if len(found) > 0 {
			got = found[0].function
		}
		if got != want || len(found) > 1 {
			t.Errorf("%s: found %v, want %q", src, found, want)
		}
	}
}

// Every package below the root is in a storey, a test's, or a folder that the
// walk names.
func TestEveryFolderIsKnown(t *testing.T) {
	known := map[string]bool{}
	for _, s := range storeys {
		for _, p := range s.packages {
			known[p] = true
		}
	}
	err := filepath.WalkDir("../..", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel("../..", name)
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && rel != "." || forTests(rel) || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if !d.IsDir() && strings.HasSuffix(rel, ".go") && !known[filepath.Dir(rel)] {
			t.Errorf("%s is in no storey", rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
