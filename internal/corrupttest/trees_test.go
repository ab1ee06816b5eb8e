package corrupttest

import (
	"errors"
	"path/filepath"
	"strings"

	"varve.dev/internal/corrupt"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// trees returns a hash over the layers of each image of a closed store: what a
// container on it would see. Neither the witness nor a writer has a part in it.
// A layer that cannot be read has its error for a hash.
func trees(dir string) (map[string]string, error) {
	images, err := corrupt.Images(dir)
	if err != nil {
		return nil, err
	}
	hashes, out := map[string]string{}, map[string]string{}
	for name, layers := range images {
		var all []string
		for _, id := range layers {
			if hashes[id] == "" {
				hash, herr := testkit.HashTree(filepath.Join(dir, layout.LayersDir, id, layout.TreeDir))
				if hashes[id] = hash; herr != nil {
					hashes[id], err = herr.Error(), errors.Join(err, herr)
				}
			}
			all = append(all, hashes[id])
		}
		out[name] = strings.Join(all, " ")
	}
	return out, err
}
