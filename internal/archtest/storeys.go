package archtest

import (
	"fmt"
	"io"
	"strings"
)

// storey is one level: its packages import only from the levels below.
type storey struct {
	packages []string
	owns     string
}

// storeys from the bottom up.
var storeys = []storey{
	{[]string{"errdefs", "internal/version", "overlay"}, "error kinds; the version of a build; a stack of layers and how to mount it"},
	{[]string{"durable", "internal/budget", "fsck/pages", "fsck/reach"}, "permanence: the one door to rename, sync and create; bytes that are bounded; the witness's eyes: bbolt's pages, files without following a link"},
	{[]string{"durable/crashsim", "layout"}, "what a power cut could leave (tests only); the format in constants and words"},
	{[]string{"metadata", "fsck", "fsck/foreign", "layer"}, "the database; the witness; other engines' stores against what they recorded; tar stream ⇄ tree, file manifests"},
	{[]string{"journal"}, "publications, removals, recovery"},
	{[]string{"content"}, "blobs and ingests"},
	{[]string{"snapshotter"}, "overlay2 snapshots"},
	{[]string{"gc", "image", "runtime"}, "what may go, and what there is; names → manifests; containers' specs and shims"},
	{[]string{"builder/bridge", "runtime/containers"}, "a build as frontends in other processes use it; containers in a store"},
	{[]string{"builder", "repair"}, "Dockerfile → LLB → results, build cache, export; what fsck found, made whole"},
	{[]string{"api/varve", "api/buildkit"}, "varve's own endpoints; BuildKit's: translation only"},
	{[]string{"daemon"}, "opens, recovers, wires, shuts down"},
	{[]string{"cmd/varve", "cmd/varve-runtime"}, "the command; the shim"},
}

// rule forbids an import whatever the storeys say.
type rule struct {
	from   string // a package of the project
	never  string // prefix of what it, and all that it imports, must not import
	reason string
}

var rules = []rule{
	{"fsck", "varve.dev/metadata", "a witness that reads through the writer's code repeats its mistakes"},
	{"fsck", "varve.dev/layer", "the same, for file manifests"},
	{"fsck", "varve.dev/durable", "it changes nothing"},
	{"fsck/foreign", "varve.dev/metadata", "it is a witness too"},
	{"fsck/foreign", "varve.dev/layer", "it is a witness too"},
	{"fsck/foreign", "varve.dev/durable", "it changes nothing"},
	{"fsck/foreign", "github.com/containerd/containerd", "it would repeat the mistakes of the engine that it looks at"},
	{"runtime", "github.com/opencontainers/runc", "libcontainer is in the shim's binary alone"},
	{"cmd/varve-runtime", "github.com/moby/buildkit", "starting a container must not pay for a builder"},
	{"cmd/varve-runtime", "github.com/containerd/containerd", "nor for registries"},
	{"cmd/varve-runtime", "go.etcd.io/bbolt", "the shim never opens the store"},
	{"cmd/varve", "github.com/opencontainers/runc", "libcontainer is in the shim's binary alone"},
	{"gc", "varve.dev/image", "what may go is decided by edges, whatever they are of"},
	{"layout", "os", "the law does no I/O"},
	{"internal/corrupt", "varve.dev", "it is somebody outside, who knows of a store what its documentation says"},
}

// Print writes docs/ARCHITECTURE.md.
func Print(w io.Writer) {
	fmt.Fprint(w, "# Storeys\n\nPrinted from `internal/archtest` by `go test ./internal/archtest -update`; tests hold the source to it.\nA package imports only from storeys below its own.\n\n| storey | packages | what they own |\n|---|---|---|\n")
	for i, s := range storeys {
		fmt.Fprintf(w, "| %d | `%s` | %s |\n", i, strings.Join(s.packages, "`, `"), s.owns)
	}
	fmt.Fprint(w, "\n`internal/testkit` makes real fixtures, `internal/faultcall` lets system calls fail, `internal/powercut` cuts the power of a real file system, `internal/corrupt` damages a store; none of them knows varve; `internal/teststore` opens stores for tests and checks what they leave, `internal/testbuild` has Dockerfiles built in them; `internal/crashtest` and `internal/corrupttest` are the campaigns over a whole store; `internal/corpustest` builds the corpus of Dockerfiles by BuildKit's clients; `internal/tables` writes what they measured into these pages.\n\n## What is never imported, and why\n\n| package | never imports, itself or through others | because |\n|---|---|---|\n")
	for _, r := range rules {
		fmt.Fprintf(w, "| `%s` | `%s` | %s |\n", r.from, r.never, r.reason)
	}
	fmt.Fprint(w, "\nIn the packages that write a store, only `durable` renames, syncs, removes and opens files for writing. The exceptions are listed with their reasons in `internal/archtest/door_test.go`.\n")
}
