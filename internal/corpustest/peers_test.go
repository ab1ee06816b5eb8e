//go:build peers

package corpustest

import (
	"path/filepath"
	"testing"

	"varve.dev/internal/testkit"
)

// TestPeers builds every case by buildkitd, at the version whose frontend varve
// has: what the cases want is what it makes.
func TestPeers(t *testing.T) {
	testkit.Need(t, "runc", "runc")
	w := newWorld(t)
	bin := peer(t, "buildkit")
	addr, _ := w.startDaemon(t, filepath.Join(bin, "buildkitd"))
	ctl := buildctl(bin, addr)
	for _, name := range caseNames(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := w.lay(t, name)
			got := c.built(t, ctl)
			if *update {
				c.update(t, "want", got)
			} else if got != c.want {
				t.Errorf("%s:\n%s", filepath.Base(c.file), difference(c.want, got))
			}
		})
	}
}
