package corpustest

import (
	"cmp"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"varve.dev/internal/testkit"
)

// TestCorpus builds every case by varve, told what to do by both clients of
// BuildKit and by varve's own command, all at one daemon: buildctl's is built,
// and the others are given the same out of the cache.
func TestCorpus(t *testing.T) {
	w := newWorld(t)
	addr := w.startVarve(t)
	ctl := buildctl(peer(t, "buildkit"), addr)
	others := map[string]clientCommand{
		"buildx": likeBuildx(newBuildx(t, addr).command),
		"varve build": likeBuildx(func(args ...string) *exec.Cmd {
			return exec.Command(filepath.Join(testkit.Binaries(t), "varve"), append([]string{"--host", addr}, args...)...)
		}),
	}
	for _, name := range caseNames(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := w.lay(t, name)
			got := c.built(t, ctl)
			if *update && c.varve != "" {
				c.update(t, "varve", got)
				return
			}
			c.compare(t, "buildctl", got)
			for who, client := range others {
				c.compare(t, who, c.built(t, client))
			}
		})
	}
}

// compare has a difference told line by line.
func (c *testCase) compare(t *testing.T, who, got string) {
	t.Helper()
	if want := cmp.Or(c.varve, c.want); got != want {
		t.Errorf("%s, %s:\n%s", who, filepath.Base(c.file), difference(want, got))
	}
}

// difference names the lines that only one of two texts has.
func difference(want, got string) string {
	count := map[string]int{}
	for line := range strings.Lines(want) {
		count[line]++
	}
	var out strings.Builder
	for line := range strings.Lines(got) {
		if count[line]--; count[line] < 0 {
			out.WriteString("got  " + line)
		}
	}
	for line := range strings.Lines(want) {
		if count[line] > 0 {
			count[line]--
			out.WriteString("want " + line)
		}
	}
	if out.Len() == 0 {
		return "the same lines in another order:\n" + got
	}
	return out.String()
}
