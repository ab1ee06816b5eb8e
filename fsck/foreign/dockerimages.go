package foreign

import (
	"encoding/json"
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/layout"
)

const (
	dockerNames   = "repositories.json"
	dockerConfigs = "imagedb/content/sha256"
	dockerSources = "distribution/v2metadata-by-diffid/sha256"
)

// dockerImage is a config in imagedb, or what a name says should be there.
type dockerImage struct {
	object
	tags, pinned []string // its names with a tag, and with a digest
}

// loadImages reads names and configs, and what they say of layers.
func (d *dockerStore) loadImages() error {
	ids, err := d.digests(dockerConfigs)
	if err != nil {
		return err
	}
	for _, id := range ids {
		d.image(id)
	}
	d.loadNames(len(ids))
	d.report.Images = len(ids)
	for id, i := range d.images {
		i.images = i.tags
		if len(i.images) == 0 {
			i.images = slices.Concat(i.pinned, []string{id.String()})[:1]
		}
		slices.Sort(i.images)
		if len(i.pinned) > 0 {
			i.source = "pull " + i.pinned[0] + " again"
		}
		d.loadConfig(id, i)
	}
	return nil
}

func (d *dockerStore) image(id digest.Digest) *dockerImage {
	if d.images[id] == nil {
		d.images[id] = &dockerImage{object: object{c: d.checker, name: "image " + id.String()}}
	}
	return d.images[id]
}

// loadNames reads repositories.json. A dockerd that never had an image may
// have none.
func (d *dockerStore) loadNames(images int) {
	data, err := readSmall(d.records, dockerNames)
	var names struct {
		Repositories map[string]map[string]digest.Digest
	}
	if err == nil {
		err = json.Unmarshal(data, &names)
	}
	self := object{c: d.checker, name: "store"}
	if err != nil && (images > 0 || !errors.Is(err, fs.ErrNotExist)) {
		self.unreadable(path.Join(dockerRecords, dockerNames), err)
	}
	for _, refs := range names.Repositories {
		for name, id := range refs {
			if err := id.Validate(); err != nil {
				self.found(Record, place{path: path.Join(dockerRecords, dockerNames)}, "%q names image %q", name, id)
				continue
			}
			i := d.image(id)
			if strings.Contains(name, "@") {
				i.pinned = append(i.pinned, name)
			} else {
				i.tags = append(i.tags, name)
			}
		}
	}
}

// loadConfig reads an image's config, whose digest is its name.
func (d *dockerStore) loadConfig(id digest.Digest, i *dockerImage) {
	name := path.Join(dockerConfigs, id.Encoded())
	at := path.Join(dockerRecords, name)
	data, err := readSmall(d.records, name)
	var config ocispec.Image
	switch {
	case err != nil:
		i.unreadable(at, err)
		return
	case digest.FromBytes(data) != id:
		i.found(Altered, place{path: at}, "the bytes have the digest %s", digest.FromBytes(data))
		return
	}
	if err := json.Unmarshal(data, &config); err != nil {
		i.found(Record, place{path: at}, "%v", err)
		return
	}
	diffs := config.RootFS.DiffIDs
	for _, diff := range diffs {
		if err := diff.Validate(); err != nil {
			i.found(Record, place{path: at}, "DiffID %q: %v", diff, err)
			return
		}
	}
	var parent digest.Digest
	for n := range diffs {
		chain := identity.ChainID(diffs[:n+1])
		d.said[chain] = chainLink{diffs[n], parent}
		d.layer(chain, diffs[n]).addImages(i.images)
		parent = chain
	}
}

// sourceOf is where the blob of a layer can be had again, by what dockerd notes
// when it pulls and pushes.
func (d *dockerStore) sourceOf(diff digest.Digest) string {
	if diff == "" {
		return ""
	}
	name := path.Join(dockerSources, diff.Encoded())
	data, err := readSmall(d.records, name)
	var sources []struct {
		Digest           digest.Digest
		SourceRepository string
	}
	if err == nil {
		err = json.Unmarshal(data, &sources)
	}
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			d.add(Finding{
				Kind: Record, Severity: layout.Notice, Object: "store", Path: path.Join(dockerRecords, name),
				Detail: "where a layer came from cannot be read: " + err.Error(), Repair: "remove it: the next pull or push writes it anew",
			})
		}
		return ""
	}
	for _, s := range slices.Backward(sources) {
		if s.SourceRepository != "" {
			return "remove the images named here and pull them again (a pull alone takes the layer for present): " + s.SourceRepository + " has it as " + s.Digest.String()
		}
	}
	return ""
}
