package fsck_test

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"varve.dev/fsck"
)

// TestFieldsAreDocumented holds docs/FSCK.md against what --json prints.
func TestFieldsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../docs/FSCK.md")
	must(t, err)
	_, own, _ := strings.Cut(string(page), "### JSON\n")
	own, _, _ = strings.Cut(own, "\n### ")
	for _, of := range []reflect.Type{reflect.TypeFor[fsck.Report](), reflect.TypeFor[fsck.Finding]()} {
		for i := range of.NumField() {
			name, _, _ := strings.Cut(of.Field(i).Tag.Get("json"), ",")
			if !strings.Contains(own, "`"+name+"`") {
				t.Errorf("%s: docs/FSCK.md does not tell of %q", of, name)
			}
		}
	}
}
