package builder

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/util/system"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
)

// emptyConfig is the config of a result that has none: a definition's, for
// example.
func emptyConfig() ([]byte, error) {
	p := platforms.Normalize(platforms.DefaultSpec())
	img := ocispec.Image{Platform: ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}}
	img.RootFS.Type = "layers"
	img.Config.WorkingDir = "/"
	img.Config.Env = []string{"PATH=" + system.DefaultPathEnv(p.OS)}
	return json.Marshal(img)
}

// finishConfig completes the frontend's config with what only the export
// knows. Times are those of the layers, so that a build that finds everything
// in the cache gives the same image again; none is later than epoch, if there
// is one, but for those of the base image's history.
func finishConfig(config []byte, layers []*exported, epoch *time.Time, base []ocispec.History) ([]byte, error) {
	if len(config) == 0 {
		var err error
		if config, err = emptyConfig(); err != nil {
			return nil, fmt.Errorf("config: %w: %w", err, errdefs.ErrInternal)
		}
	}
	fields := map[string]json.RawMessage{}
	var image ocispec.Image
	if err := errors.Join(json.Unmarshal(config, &fields), json.Unmarshal(config, &image)); err != nil {
		return nil, fmt.Errorf("invalid image config for export: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	switch {
	case fields == nil:
		return nil, fmt.Errorf("invalid null image config for export: %w", errdefs.ErrInvalidArgument)
	case image.OS == "":
		return nil, fmt.Errorf("invalid image config for export: missing os: %w", errdefs.ErrInvalidArgument)
	case image.Architecture == "":
		return nil, fmt.Errorf("invalid image config for export: missing architecture: %w", errdefs.ErrInvalidArgument)
	}
	rootfs := ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}
	for _, l := range layers {
		rootfs.DiffIDs = append(rootfs.DiffIDs, l.diffID)
	}
	list := history(image.History, layers)
	if epoch != nil {
		clampHistory(list, *epoch, base)
	}
	created := image.Created
	if created == nil {
		for i := range list {
			if list[i].Created != nil {
				created = list[i].Created
			}
		}
	}
	if created != nil && epoch != nil && created.After(*epoch) {
		created = epoch
	}
	for name, v := range map[string]any{"rootfs": rootfs, "history": list, "created": created} {
		data, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("config: %w: %w", err, errdefs.ErrInternal)
		}
		fields[name] = data
	}
	return json.Marshal(fields) // names in order
}

// clampHistory gives what was made after the epoch its time. What the base
// image says of itself stays.
func clampHistory(list []ocispec.History, epoch time.Time, base []ocispec.History) {
	ours := false
	for i := range list {
		if ours = ours || i >= len(base) || !reflect.DeepEqual(list[i], base[i]); !ours {
			continue
		}
		if list[i].Created == nil || list[i].Created.After(epoch) {
			list[i].Created = &epoch
		}
	}
}

// history gives each layer one entry that is not empty, and each entry a time:
// its layer's, or for one without a layer that of the first new layer, or of
// the entry before.
func history(list []ocispec.History, layers []*exported) []ocispec.History {
	out := make([]ocispec.History, 0, len(list)+len(layers))
	next := 0
	for _, h := range list {
		if !h.EmptyLayer {
			if next >= len(layers) {
				h.EmptyLayer = true // the step made no layer after all
			} else if h.Created == nil {
				h.Created = &layers[next].record.Created
			}
			next++
		}
		out = append(out, h)
	}
	for ; next < len(layers); next++ {
		out = append(out, ocispec.History{Created: &layers[next].record.Created, CreatedBy: "varve"})
	}
	var at *time.Time
	missing := false
	for _, h := range out {
		if h.Created != nil {
			at = h.Created
			if missing {
				break
			}
		} else {
			missing = true
		}
	}
	missing = false
	for i := range out {
		if out[i].Created == nil {
			missing, out[i].Created = true, at
		} else if missing {
			at = out[i].Created
		}
	}
	return out
}
