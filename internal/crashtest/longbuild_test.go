package crashtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/moby/buildkit/client"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/internal/testbuild"
)

// A long build has stages that are built at once, each of steps that stand on one
// another, and a last one that takes a file of each.
const (
	longStages = 4
	stageSteps = 9
	longSteps  = longStages * (stageSteps + 1)
)

// longBuild is the Dockerfile of a long build, which has no step in common with
// one of another nonce. In each stage every third step is a COPY.
func longBuild(from, nonce string) string {
	var b strings.Builder
	for s := range longStages {
		fmt.Fprintf(&b, "FROM %s AS stage%d\n", from, s)
		for n := range stageSteps {
			if n%3 == 1 {
				fmt.Fprintf(&b, "COPY file-%d /made/%s-%d\n", n, nonce, n)
			} else {
				fmt.Fprintf(&b, "RUN mkdir -p /made && echo %s %d %d >/made/%d && cat /made/* >/all\n", nonce, s, n, n)
			}
		}
	}
	fmt.Fprintf(&b, "FROM %s\n", from)
	for s := range longStages {
		fmt.Fprintf(&b, "COPY --from=stage%d /made /stage%d\n", s, s)
	}
	return b.String()
}

// longContext puts the files of long builds into a directory.
func longContext(dir string) error {
	err := os.MkdirAll(dir, 0o755)
	for n := range stageSteps {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, fmt.Sprintf("file-%d", n)), plainContents(n), 0o644))
	}
	return err
}

// steps is what a client was told of a build's steps by the time of its end.
type steps struct {
	mu   sync.Mutex
	over map[string]bool // name → whether it was carried out, and not known before
	each func(name string, ran bool)
}

// tell enters a status: steps that are over, with success.
func (s *steps) tell(st *client.SolveStatus) {
	for _, v := range st.Vertexes {
		stage, instruction, ok := strings.Cut(v.Name, "] ")
		if v.Completed == nil || v.Error != "" || !ok || stage == "[internal" || strings.HasPrefix(instruction, "FROM ") {
			continue
		}
		s.mu.Lock()
		_, known := s.over[v.Name]
		if s.over == nil {
			s.over = map[string]bool{}
		}
		s.over[v.Name] = s.over[v.Name] || !v.Cached
		s.mu.Unlock()
		if !known && s.each != nil {
			s.each(v.Name, !v.Cached)
		}
	}
}

// finished are the names of the steps that are over.
func (s *steps) finished() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.over))
}

// ranAgain returns those of the steps that were carried out in this build.
func (s *steps) ranAgain(before []string) (again []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range before {
		if s.over[name] {
			again = append(again, name)
		}
	}
	return again
}

// cutBuilds is what came of builds that were cut off and made again.
type cutBuilds struct {
	by, steps     string
	cuts          int
	before, again int // steps that were told to be over, and those that ran again
	bad           int // cuts after which something was wrong
}

// wantedHits is the share of steps, in percent, that must be known after a cut.
const wantedHits = 99

func (c *cutBuilds) hits() float64 { return 100 * (1 - float64(c.again)/float64(max(c.before, 1))) }

var cutBuildTable = table{"cut builds", row{"the build is cut by", "builds", "cuts", "steps told to be over by then", "of them known when it is made again", "cuts with anything else wrong"}}

// Row is the outcome for a table.
func (c *cutBuilds) Row() row {
	return row{c.by, c.steps, fmt.Sprint(c.cuts), fmt.Sprint(c.before), fmt.Sprintf("%d (%.1f %%)", c.before-c.again, c.hits()), fmt.Sprint(c.bad)}
}

// cutNonces are the builds that a worker makes one after the other.
var cutNonces = []string{"first", "second"}

// buildLong makes long builds and marks each step that is over, as a role.
// args are those of place, and the nonces of the builds.
func buildLong(dir string, args []string, mark func(string, ...any)) (err error) {
	ctx := context.Background()
	e, err := daemon.Open(ctx, daemon.Options{Root: dir, State: args[0]})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Close(ctx)) }()
	mark("opened")
	files, err := os.MkdirTemp(filepath.Dir(args[0]), "context-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(files)
	if err := longContext(files); err != nil {
		return err
	}
	for _, nonce := range args[2:] {
		name := "long:" + nonce
		mark("will +%s", name)
		s := steps{each: func(step string, ran bool) { mark("over %t %s %s", ran, nonce, step) }}
		_, err := testbuild.Run(ctx, e, testbuild.Build{
			Name: name, Dockerfile: longBuild(args[1]+"/"+smallName, nonce), Dir: files,
			Registry: varve.Registry{PlainHTTPHosts: []string{args[1]}}, Told: s.tell,
		})
		if err != nil {
			return fmt.Errorf("build %s: %w", nonce, err)
		}
		mark("did +%s", name)
	}
	return eachLayer(dir, func(id, hash string) { mark(fact+"layer %s %s", id, hash) })
}
