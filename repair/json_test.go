package repair

import (
	"reflect"
	"testing"

	"varve.dev/internal/tables"
)

// TestFieldsAreDocumented holds docs/FSCK.md against what --json prints.
func TestFieldsAreDocumented(t *testing.T) {
	tables.Fields(t, "../docs/FSCK.md", "A plan has ", "### ",
		reflect.TypeFor[Plan](), reflect.TypeFor[Step](), reflect.TypeFor[Outcome](), reflect.TypeFor[Container]())
}
