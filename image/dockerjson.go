package image

import (
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// DockerInspect is what `docker image inspect` prints, as far as it is about
// the image and not about the engine. Field names are docker's.
type DockerInspect struct {
	ID           string `json:"Id"`
	RepoTags     []string
	RepoDigests  []string
	Comment      string
	Created      string
	Author       string
	Config       ocispec.ImageConfig
	Architecture string
	Variant      string `json:",omitempty"`
	Os           string
	Size         int64
	RootFS       DockerRootFS
	Descriptor   ocispec.Descriptor
}

// DockerRootFS is docker's name for the chain of DiffIDs.
type DockerRootFS struct {
	Type   string
	Layers []digest.Digest `json:",omitempty"`
}

// Docker translates.
func (d Details) Docker() DockerInspect {
	out := DockerInspect{
		ID: d.ID.String(), RepoTags: []string{}, RepoDigests: []string{}, Author: d.Image.Author, Config: d.Image.Config,
		Architecture: d.Image.Architecture, Variant: d.Image.Variant, Os: d.Image.OS, Size: d.Size,
		RootFS: DockerRootFS{Type: d.Image.RootFS.Type, Layers: d.Image.RootFS.DiffIDs}, Descriptor: d.Target,
	}
	if !d.Created.IsZero() {
		out.Created = d.Created.UTC().Format(time.RFC3339Nano)
	}
	if n := len(d.Image.History); n > 0 {
		out.Comment = d.Image.History[n-1].Comment
	}
	digests := map[string]bool{}
	for _, name := range d.Names {
		ref, err := ParseRef(name)
		if err != nil {
			continue // names of other tools, through containerd's API
		}
		if ref.Digest() == "" {
			out.RepoTags = append(out.RepoTags, ref.Familiar())
		}
		if at := ref.FamiliarRepository() + "@" + d.Target.Digest.String(); !digests[at] {
			digests[at] = true
			out.RepoDigests = append(out.RepoDigests, at)
		}
	}
	return out
}
