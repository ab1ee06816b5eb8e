package metadata

import (
	"fmt"
	"maps"
	"strings"

	"varve.dev/errdefs"
)

// ChangeLabels applies an update of labels in containerd's manner: all of
// them, or with fieldpaths "labels" or "labels.<name>" those; an empty value
// then removes the label. Errors: ErrInvalidArgument for any other field.
func ChangeLabels(old, new map[string]string, fieldpaths []string) (map[string]string, error) {
	if len(fieldpaths) == 0 {
		return maps.Clone(new), nil
	}
	out := map[string]string{}
	maps.Copy(out, old)
	for _, f := range fieldpaths {
		name, one := strings.CutPrefix(f, "labels.")
		switch {
		case f == "labels":
			out = map[string]string{}
			maps.Copy(out, new)
		case one && new[name] == "":
			delete(out, name)
		case one:
			out[name] = new[name]
		default:
			return nil, fmt.Errorf("field %q cannot be changed: %w", f, errdefs.ErrInvalidArgument)
		}
	}
	return out, nil
}
