package builder

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/util/compression"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// CommitRequest asks for an image of a writable layer.
type CommitRequest struct {
	Snapshot layout.SnapshotKey // active; nobody may write to it
	Config   []byte             // of the image that it stands on, JSON
	Names    []string           // full names for the image
	// What goes into the image's history.
	Author, Message string
	Command         []string // that wrote the layer
}

// Committed is an image that was made.
type Committed struct{ Manifest, Config ocispec.Descriptor }

// Commit makes an image with one more layer than the one that a writable layer
// stands on. The writable layer stays as it is. Errors: those of
// snapshotter.Capture; ErrInvalidArgument for a config that does not decode.
func (b *Builder) Commit(ctx context.Context, req CommitRequest) (Committed, error) {
	config, err := withHistory(req.Config, ocispec.History{
		Author: req.Author, Comment: req.Message, CreatedBy: strings.Join(req.Command, " "),
	})
	if err != nil {
		return Committed{}, err
	}
	j, err := b.begin(ctx, Request{})
	if err != nil {
		return Committed{}, err
	}
	defer j.end()
	// Its container may be removed meanwhile.
	if err := j.hold(ctx, []layout.SnapshotKey{req.Snapshot}); err != nil {
		return Committed{}, err
	}
	top := layout.SnapshotKey("commit:" + layout.NewID())
	if err := b.Snaps.Capture(ctx, j.lease.Node(), top, req.Snapshot); err != nil {
		return Committed{}, err
	}
	w := j.newWriter(imageOptions{oci: true, compression: compression.New(compression.Default)}, nil, nil)
	tree := &built{
		metadata: map[string][]byte{exptypes.ExporterImageConfigKey: config}, trees: map[string]layout.SnapshotKey{"": top},
		platforms: []exptypes.Platform{{}},
	}
	root, configDesc, err := w.manifest(ctx, tree, &tree.platforms[0], annotations{})
	if err != nil {
		return Committed{}, w.abandon(err)
	}
	names := req.Names
	if len(names) == 0 {
		names = []string{"<none>@" + root.Digest.String()}
	}
	return Committed{Manifest: root, Config: configDesc}, w.publish(ctx, root, names)
}

// withHistory returns a config with one more step, and its author.
func withHistory(config []byte, step ocispec.History) ([]byte, error) {
	fields := map[string]json.RawMessage{}
	var image ocispec.Image
	for _, into := range []any{&fields, &image} {
		if err := json.Unmarshal(config, into); err != nil {
			return nil, fmt.Errorf("config of the image: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	now := time.Now().UTC()
	step.Created = &now
	values := map[string]any{"history": append(image.History, step)}
	if step.Author != "" {
		values["author"] = step.Author
	}
	for name, v := range values {
		data, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("config: %w: %w", err, errdefs.ErrInternal)
		}
		fields[name] = data
	}
	return json.Marshal(fields)
}
