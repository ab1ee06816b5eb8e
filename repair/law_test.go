package repair

import (
	"maps"
	"slices"
	"testing"

	"varve.dev/layout"
)

// Every invariant is healed in exactly one way, or by nobody.
func TestEveryInvariantHasItsRepair(t *testing.T) {
	ways := map[string]int{}
	for _, list := range [][]string{treeInvariants, blobInvariants, slices.Collect(maps.Keys(recordRepairs)), healedByOpening, leftToUsers} {
		for _, id := range list {
			ways[id]++
		}
	}
	for _, inv := range layout.Invariants() {
		if ways[inv.ID] != 1 {
			t.Errorf("%s is healed in %d ways", inv.ID, ways[inv.ID])
		}
		delete(ways, inv.ID)
	}
	if len(ways) > 0 {
		t.Errorf("no invariants: %v", ways)
	}
}

func TestObjectsAreRead(t *testing.T) {
	e := layout.Edge{Parent: layout.ImageNode(`a "b" c`), Rel: layout.RelTarget, Child: "blob:sha256:00"}
	got, err := edgeOf(`edge "image:a \"b\" c" -target-> "blob:sha256:00"`)
	if err != nil || got != e {
		t.Errorf("%+v, %v", got, err)
	}
	if s, err := quoted(`snapshot "a \"b\"\x00"`); err != nil || s != "a \"b\"\x00" {
		t.Errorf("%q, %v", s, err)
	}
}
