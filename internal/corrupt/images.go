package corrupt

import (
	"fmt"
	"slices"
	"strings"
)

// Images returns the layers of each image of a closed store that is unpacked,
// the bottom one first, by the references that lead there.
func Images(root string) (map[string][]string, error) {
	s := &store{root: root}
	images, err := s.keys("images")
	if err != nil {
		return nil, err
	}
	snapshots, err := s.records("snapshots")
	if err != nil {
		return nil, err
	}
	edges, err := s.edges()
	if err != nil {
		return nil, err
	}
	out := map[string][]string{}
	for _, name := range images {
		top, ok := unpacked(edges, "image:"+name)
		if !ok {
			continue
		}
		var layers []string
		for at := top; at != ""; at = snapshots[at].text("parent") {
			if len(layers) > len(snapshots) {
				return nil, fmt.Errorf("image %s: its snapshots form a circle", name)
			}
			layers = append(layers, snapshots[at].text("layer"))
		}
		slices.Reverse(layers)
		out[name] = layers
	}
	return out, nil
}

// unpacked follows references down to the snapshot of a whole image.
func unpacked(edges []edge, from string) (key string, ok bool) {
	for _, e := range edges {
		if e.parent != from {
			continue
		}
		switch e.rel {
		case "unpacked":
			return strings.TrimPrefix(e.child, "snapshot:"), true
		case "target", "content":
			if key, ok := unpacked(edges, e.child); ok {
				return key, true
			}
		}
	}
	return "", false
}
