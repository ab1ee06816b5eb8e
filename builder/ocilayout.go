package builder

import (
	"context"
	"fmt"
	"strings"

	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/session/content"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// layoutOrigin is an image of an OCI layout that the client has.
type layoutOrigin struct {
	j        *job
	platform ocispec.Platform
	ref      string // NAME@DIGEST
	digest   digest.Digest
	session  string
	store    string // the layout's name at the client
}

func newLayoutOrigin(j *job, platform ocispec.Platform, ref string, attrs map[string]string) (*layoutOrigin, error) {
	name, d, ok := strings.Cut(ref, "@")
	o := &layoutOrigin{j: j, platform: platform, ref: ref, digest: digest.Digest(d), session: attrs[pb.AttrOCILayoutSessionID], store: attrs[pb.AttrOCILayoutStoreID]}
	if o.store == "" {
		o.store = name
	}
	if !ok || o.digest.Validate() != nil {
		return nil, fmt.Errorf("source %s%s has no digest: %w", schemeOCILayout, ref, errdefs.ErrInvalidArgument)
	}
	return o, nil
}

func (o *layoutOrigin) identify(context.Context) (string, error) {
	return imageKey(o.digest, o.platform), nil
}

func (o *layoutOrigin) foreign(ctx context.Context) (Foreign, error) {
	caller, err := o.j.caller(ctx, o.session)
	return Foreign{Name: "OCI layout " + o.store, Store: content.NewCallerStore(caller, "oci:"+o.store)}, err
}

func (o *layoutOrigin) bring(ctx context.Context, key string) (outputs, error) {
	return o.j.holdImage(ctx, key, func() (layout.SnapshotKey, error) {
		from, err := o.foreign(ctx)
		if err != nil {
			return "", err
		}
		return o.j.req.Images.SnapshotIn(ctx, from, o.digest, o.platform, o.j.lease.Node())
	})
}

func (o *layoutOrigin) metadata(ctx context.Context) (*sourceresolver.ResolveImageResponse, error) {
	from, err := o.foreign(ctx)
	if err != nil {
		return nil, err
	}
	config, err := o.j.req.Images.ResolveIn(ctx, from, o.digest, o.platform)
	return &sourceresolver.ResolveImageResponse{Digest: o.digest, Config: config}, err
}
