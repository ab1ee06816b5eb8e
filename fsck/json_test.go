package fsck_test

import (
	"reflect"
	"testing"

	"varve.dev/fsck"
	"varve.dev/internal/tables"
)

// TestFieldsAreDocumented holds docs/FSCK.md against what --json prints.
func TestFieldsAreDocumented(t *testing.T) {
	tables.Fields(t, "../docs/FSCK.md", "### JSON", "A plan has ",
		reflect.TypeFor[fsck.Report](), reflect.TypeFor[fsck.Finding]())
}
