package foreign

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

const dockerMounts = "layerdb/mounts"

// loadContainers looks at what containers need: their configs, their writable
// layers, and the layer of an image below. What they have written nobody has
// recorded.
func (d *dockerStore) loadContainers() error {
	ids, err := d.records.list(dockerMounts)
	slices.Sort(ids)
	for _, id := range ids {
		d.container(id)
	}
	if err != nil {
		return unavailable(err)
	}
	configs, err := openDirectory(filepath.Join(d.opts.Root, "containers"))
	if err != nil {
		return nil // it never had one
	}
	defer configs.close()
	ids, err = configs.list(".")
	slices.Sort(ids)
	for _, id := range ids {
		for _, name := range []string{"config.v2.json", "hostconfig.json"} {
			data, err := readSmall(configs, path.Join(id, name))
			if err == nil && !json.Valid(data) {
				err = errors.New("it is no JSON")
			}
			if err != nil {
				o := object{c: d.checker, name: "container " + id}
				o.unreadable(path.Join("containers", id, name), err)
			}
		}
	}
	return unavailable(err)
}

// container reads the record of a container's writable layer. Only that has
// to be: a container may be of nothing.
func (d *dockerStore) container(id string) {
	o := &object{c: d.checker, name: "container " + id}
	for _, name := range []string{"mount-id", "init-id"} {
		file := path.Join(dockerMounts, id, name)
		data, err := readSmall(d.records, file)
		if name == "init-id" && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		tree := strings.TrimSpace(string(data))
		if err == nil && !ownTree.MatchString(tree) {
			err = fmt.Errorf("%q is no folder's name", tree)
		}
		if err != nil {
			o.unreadable(path.Join(dockerRecords, file), err)
			continue
		}
		d.taken[tree] = true
		if !d.trees.isDir(path.Join(tree, "diff")) {
			o.found(Missing, place{path: path.Join(dockerTrees, tree, "diff")}, "its tree is not there")
		}
	}
	file := path.Join(dockerMounts, id, "parent")
	data, err := readSmall(d.records, file)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	parent := digest.Digest(strings.TrimSpace(string(data)))
	if err == nil {
		err = parent.Validate()
	}
	if err != nil {
		o.unreadable(path.Join(dockerRecords, file), err)
	} else if l := d.layers[parent]; l == nil || l.gone {
		if l != nil {
			o.source = l.source
		}
		o.found(Missing, place{path: path.Join(dockerRecords, file)}, "the layer %s of its image is not there", parent)
	}
}
