package fsck

import (
	"testing"

	"varve.dev/layout"
)

// The law and the table of checks have the same numbers.
func TestChecksAreThoseOfTheLaw(t *testing.T) {
	for _, inv := range layout.Invariants() {
		if checks[inv.ID] == nil {
			t.Errorf("%s has no check", inv.ID)
		}
	}
	for id := range checks {
		if _, ok := layout.FindInvariant(id); !ok {
			t.Errorf("%s is checked and is no invariant", id)
		}
	}
}
