package builder

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

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

// Commit makes an image with one more layer than the one that a writable layer
// stands on. The writable layer stays as it is. Errors: those of
// snapshotter.Capture; ErrInvalidArgument for a config that does not decode.
func (b *Builder) Commit(ctx context.Context, req CommitRequest) (Result, error) {
	config, err := withHistory(req.Config, ocispec.History{
		Author: req.Author, Comment: req.Message, CreatedBy: strings.Join(req.Command, " "),
	})
	if err != nil {
		return Result{}, err
	}
	s, err := b.begin(ctx, Request{Names: req.Names}, ocispec.Platform{})
	if err != nil {
		return Result{}, err
	}
	defer s.end()
	// Its container may be removed meanwhile.
	if err := s.hold(ctx, []layout.SnapshotKey{req.Snapshot}); err != nil {
		return Result{}, err
	}
	top := layout.SnapshotKey("commit:" + layout.NewID())
	if err := b.Snaps.Capture(ctx, s.lease.Node(), top, req.Snapshot); err != nil {
		return Result{}, err
	}
	return s.export(ctx, top, config)
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
