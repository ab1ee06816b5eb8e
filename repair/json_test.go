package repair

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// TestFieldsAreDocumented holds docs/FSCK.md against what --json prints of a
// plan.
func TestFieldsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../docs/FSCK.md")
	if err != nil {
		t.Fatal(err)
	}
	_, plan, _ := strings.Cut(string(page), "\nA plan has ")
	plan, _, _ = strings.Cut(plan, "\n### ")
	for _, of := range []reflect.Type{reflect.TypeFor[Plan](), reflect.TypeFor[Step](), reflect.TypeFor[Outcome](), reflect.TypeFor[Container]()} {
		for f := range of.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if f.IsExported() && !regexp.MustCompile("`(done\\.)?"+name+"`").MatchString(plan) {
				t.Errorf("%s: docs/FSCK.md does not tell of %q", of, name)
			}
		}
	}
}
