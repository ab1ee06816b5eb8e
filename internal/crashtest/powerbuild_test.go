package crashtest

import (
	"fmt"
	"strings"
	"testing"
)

// TestPowerCutInABuild cuts the power while long builds are made. Of the steps
// that the client had been told are over, none is carried out when the builds are
// made again.
func TestPowerCutInABuild(t *testing.T) {
	at := newPlace(t, 1, 1)
	cuts := caseCount(t, 40) / 20
	for _, kind := range kinds(t) {
		t.Run(string(kind), func(t *testing.T) {
			rig := newRig(t)
			rec, lines := record(t, rig, kind, diskSize(0), at.worker("build long"), append([]string{at.state, at.remote}, cutNonces...)...)
			known := factsOf(lines)
			images := rec.Replay()
			c := &cutBuilds{by: "a power cut, " + string(kind), steps: fmt.Sprintf("%d of %d steps in %d stages", len(cutNonces), longSteps, longStages), cuts: cuts}
			for _, cut := range rec.Choose(cuts, seed(t)) {
				m, err := rig.Mount(kind, images.Image(cut))
				must(t, err)
				wrong := at.afterCutBuild(m.Dir, rec.Marks(cut.At), known, c)
				must(t, m.Unmount())
				if len(wrong) > 0 {
					c.bad++
					t.Errorf("%s:\n  %s", cut, strings.Join(wrong, "\n  "))
				}
			}
			if c.hits() < wantedHits {
				t.Errorf("%.1f %% of the steps were known after a cut", c.hits())
			}
			tell(t, cutBuildTable, c)
		})
	}
}

// afterCutBuild recovers the store in dir and makes the builds again that had
// begun, which says what was lost, and looks at the store again.
func (p place) afterCutBuild(dir string, marks []string, known facts, c *cutBuilds) (wrong []string) {
	f := p.judge(dir, ledgerOf(marks), known, false)
	if !f.started {
		return f.wrong
	}
	var before, begun []string
	for _, m := range marks {
		if name, ok := strings.CutPrefix(m, "will +long:"); ok {
			begun = append(begun, name)
		}
		if step, ok := strings.CutPrefix(m, "over true "); ok {
			before = append(before, step)
		}
	}
	again := map[string]bool{}
	var done []string
	w := p.worker("build long")
	w.Mark = func(m string) {
		if step, ok := strings.CutPrefix(m, "over true "); ok {
			again[step] = true
		}
		done = append(done, m)
	}
	wrong = f.wrong
	if err := w.Run(dir, append([]string{p.state, p.remote}, begun...)...); err != nil {
		wrong = append(wrong, err.Error())
	}
	c.before += len(before)
	for _, step := range before {
		if again[step] {
			c.again++
		}
	}
	return append(wrong, p.judge(dir, ledgerOf(withoutFacts(done)), known, false).wrong...)
}

// withoutFacts are marks in time alone.
func withoutFacts(marks []string) (rest []string) {
	for _, m := range marks {
		if !strings.HasPrefix(m, fact) {
			rest = append(rest, m)
		}
	}
	return rest
}
