package builder

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/platforms"
	distref "github.com/distribution/reference"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session/content"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/moby/buildkit/util/grpcerrors"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"

	"varve.dev/errdefs"
)

// imageOptions say what an image is to look like.
type imageOptions struct {
	names       string // with commas between them; "*" for the frontend's
	oci         bool   // media types, not docker's
	artifact    bool   // attestations as OCI artifacts
	inline      bool   // attestations in an index, though the platform is one
	rewrite     bool   // times in layers that are younger than the epoch
	epoch       *epoch
	compression compression.Config
	annotations annotations
	metadata    map[string]string // what is left: added to the result's
}

func (a *attrs) image(inline bool) (o imageOptions, err error) {
	o.names = a.text(string(exptypes.OptKeyName))
	if o.compression, err = compression.ParseAttributes(a.left); err != nil {
		return o, fmt.Errorf("exporter %s: %w: %w", a.exporter, err, errdefs.ErrInvalidArgument)
	}
	for _, key := range []exptypes.ImageExporterOptKey{exptypes.OptKeyLayerCompression, exptypes.OptKeyForceCompression, exptypes.OptKeyCompressionLevel} {
		a.take(string(key))
	}
	o.oci = a.is(string(exptypes.OptKeyOCITypes), true)
	o.artifact = a.is(string(exptypes.OptKeyOCIArtifact), o.oci)
	o.inline = a.is(string(exptypes.OptKeyForceInlineAttestations), inline)
	o.rewrite = a.is(string(exptypes.OptKeyRewriteTimestamp), false)
	a.flag(string(exptypes.OptKeyPreferNondistLayers)) // no layer here is one
	o.epoch = a.epoch()
	switch {
	case a.err != nil:
		return o, a.err
	case !o.oci && o.compression.Type.OnlySupportOCITypes():
		return o, fmt.Errorf("exporter option \"compression=%s\" conflicts with \"oci-mediatypes=false\": %w", o.compression.Type, errdefs.ErrInvalidArgument)
	case !o.oci && o.artifact:
		return o, fmt.Errorf("exporter option \"oci-artifact=true\" conflicts with \"oci-mediatypes=false\": %w", errdefs.ErrInvalidArgument)
	}
	o.annotations = annotations{}
	for k, v := range a.left {
		ok, err := o.annotations.add(k, v)
		if err != nil {
			return o, err
		}
		if ok {
			delete(a.left, k)
		}
	}
	o.metadata = a.left
	return o, nil
}

// annotations are those of a platform, or of "" for all, by their type.
type annotations map[string]map[string]map[string]string

// add takes an attribute that is an annotation.
func (a annotations) add(key, value string) (bool, error) {
	k, ok, err := exptypes.ParseAnnotationKey(key)
	if err != nil {
		return ok, fmt.Errorf("annotation %q: %w: %w", key, err, errdefs.ErrInvalidArgument)
	}
	if !ok {
		return false, nil
	}
	p := k.PlatformString()
	if a[p] == nil {
		a[p] = map[string]map[string]string{}
	}
	if a[p][k.Type] == nil {
		a[p][k.Type] = map[string]string{}
	}
	a[p][k.Type][k.Key] = value
	return true, nil
}

// of returns the annotations of a type, for a platform or an index; nil if
// there are none.
func (a annotations) of(kind string, p *ocispec.Platform) map[string]string {
	out := map[string]string{}
	maps.Copy(out, a[""][kind])
	if p != nil {
		maps.Copy(out, a[platforms.FormatAll(*p)][kind])
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

// with adds annotations that the frontend asked for.
func (a annotations) with(metadata map[string][]byte) (annotations, error) {
	out := annotations{}
	for _, kinds := range []annotations{a} {
		for p, byKind := range kinds {
			out[p] = map[string]map[string]string{}
			for kind, m := range byKind {
				out[p][kind] = maps.Clone(m)
			}
		}
	}
	for k, v := range metadata {
		if _, err := out.add(k, string(v)); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// check refuses annotations that have no place.
func (a annotations) check(b *built, o imageOptions, index bool) error {
	for p, kinds := range a {
		if p != "" {
			found := false
			for _, known := range b.platforms {
				found = found || known.ID == p
			}
			if !found {
				return fmt.Errorf("invalid annotation: no platform %s found in source: %w", p, errdefs.ErrInvalidArgument)
			}
		}
		if !o.oci && len(kinds[exptypes.AnnotationIndex])+len(kinds[exptypes.AnnotationIndexDescriptor])+len(kinds[exptypes.AnnotationManifestDescriptor]) > 0 {
			return fmt.Errorf("cannot export annotations with \"oci-mediatypes=false\": %w", errdefs.ErrInvalidArgument)
		}
		if !index && len(kinds[exptypes.AnnotationIndex])+len(kinds[exptypes.AnnotationIndexDescriptor]) > 0 {
			return fmt.Errorf("index annotations not supported for single platform export: %w", errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// imageExporter makes an image of the store, and sends it to its registry if
// that is asked for.
type imageExporter struct {
	j        *job
	o        imageOptions
	push     bool
	byDigest bool
	store    bool
	dangling string // what an image without a name is called before its digest
}

func newImageExporter(j *job, m map[string]string) (*imageExporter, error) {
	a := newAttrs(client.ExporterImage, m)
	x := &imageExporter{
		j: j, push: a.is(string(exptypes.OptKeyPush), false), byDigest: a.is(string(exptypes.OptKeyPushByDigest), false),
		store: a.is(string(exptypes.OptKeyStore), true), dangling: a.text(string(exptypes.OptKeyDanglingPrefix)),
	}
	for _, key := range []exptypes.ImageExporterOptKey{exptypes.OptKeyInsecure, exptypes.OptKeyUnpack, exptypes.OptKeyDanglingEmptyOnly, exptypes.OptKeyNameCanonical} {
		a.flag(string(key)) // what they ask for is so here
	}
	var err error
	x.o, err = a.image(true)
	return x, err
}

func (x *imageExporter) title() string { return "exporting to image" }

func (x *imageExporter) export(ctx context.Context, v *vertex, b *built) (map[string]string, error) {
	names, err := x.o.namesOf(b)
	if err != nil {
		return nil, err
	}
	if x.push && len(names) == 0 {
		return nil, fmt.Errorf("an image without a name cannot be pushed: %w", errdefs.ErrInvalidArgument)
	}
	w := x.j.newWriter(x.o, v, names)
	root, err := w.image(ctx, b)
	if err != nil {
		return nil, w.abandon(err)
	}
	keep := names
	if len(keep) == 0 {
		prefix := x.dangling
		if prefix == "" {
			prefix = "<none>"
		}
		keep = []string{prefix + "@" + root.Digest.String()}
	}
	for _, name := range keep {
		defer x.j.progress.part(v, "naming to "+name, "naming").done()
	}
	if err := w.publish(ctx, root, keep); err != nil {
		return nil, err
	}
	if x.push {
		for _, name := range names {
			p := x.j.progress.part(v, "pushing "+name, "pushing")
			err := x.j.req.Images.Push(ctx, name, root, x.byDigest)
			p.done()
			if err != nil {
				return nil, fmt.Errorf("failed to push %s: %w", name, err)
			}
		}
	}
	return response(root, w.config, x.o.names, names)
}

// response tells of an image in the exporters' terms.
func response(root, config ocispec.Descriptor, asked string, names []string) (map[string]string, error) {
	out := map[string]string{exptypes.ExporterImageDigestKey: root.Digest.String()}
	if config.Digest != "" {
		out[exptypes.ExporterImageConfigDigestKey] = config.Digest.String()
	}
	if len(names) > 0 {
		out[exptypes.ExporterImageNameKey] = strings.Join(names, ",")
		if asked != "" && asked != "*" {
			out[exptypes.ExporterImageNameKey] = asked
		}
	}
	data, err := json.Marshal(root)
	if err != nil {
		return nil, fmt.Errorf("descriptor: %w: %w", err, errdefs.ErrInternal)
	}
	out[exptypes.ExporterImageDescriptorKey] = base64.StdEncoding.EncodeToString(data)
	return out, nil
}

// namesOf are the full names that were asked for.
func (o imageOptions) namesOf(b *built) (names []string, err error) {
	list := o.names
	if list == "*" {
		list = string(b.metadata[exptypes.ExporterImageNameKey])
	}
	for name := range strings.SplitSeq(list, ",") {
		if name == "" {
			continue
		}
		named, err := distref.ParseNormalizedNamed(name)
		if err != nil {
			return nil, fmt.Errorf("failed to parse %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		names = append(names, distref.TagNameOnly(named).String())
	}
	return names, nil
}

// archiveExporter sends an image to the client: as a tar stream, or blob by
// blob into a store of the client's.
type archiveExporter struct {
	j    *job
	id   int
	kind string
	o    imageOptions
	tar  bool
}

func newArchiveExporter(j *job, id int, kind string, m map[string]string) (*archiveExporter, error) {
	a := newAttrs(kind, m)
	x := &archiveExporter{j: j, id: id, kind: kind, tar: a.is("tar", true)}
	var err error
	x.o, err = a.image(false)
	return x, err
}

func (x *archiveExporter) title() string { return "exporting to " + x.kind + " image format" }

func (x *archiveExporter) export(ctx context.Context, v *vertex, b *built) (map[string]string, error) {
	if x.kind == client.ExporterDocker && b.perKey {
		return nil, fmt.Errorf("docker exporter does not currently support exporting manifest lists: %w", errdefs.ErrInvalidArgument)
	}
	names, err := x.o.namesOf(b)
	if err != nil {
		return nil, err
	}
	caller, err := x.j.caller(ctx, "")
	if err != nil {
		return nil, err
	}
	w := x.j.newWriter(x.o, v, names)
	root, err := w.image(ctx, b)
	if err != nil {
		return nil, w.abandon(err)
	}
	if err := w.publish(ctx, root, nil); err != nil {
		return nil, err
	}
	if root.Annotations == nil {
		root.Annotations = map[string]string{}
	}
	if root.Annotations[ocispec.AnnotationCreated] == "" {
		at := time.Now()
		if e, err := b.epoch(x.o.epoch, nil); err == nil && e != nil {
			at = *e
		}
		root.Annotations[ocispec.AnnotationCreated] = at.UTC().Format(time.RFC3339)
	}
	answer, err := response(root, w.config, "", names)
	if err != nil {
		return nil, err
	}
	if !x.tar {
		return answer, contentutil.CopyChain(ctx, content.NewCallerStore(caller, "export"), x.j.b.Blobs, root)
	}
	defer x.j.progress.part(v, "sending tarball", "sending").done()
	options := []archive.ExportOpt{archive.WithManifest(root, names...)}
	if x.kind == client.ExporterOCI {
		options = append(options, archive.WithAllPlatforms(), archive.WithSkipDockerManifest())
	}
	out, err := filesync.CopyFileWriter(ctx, answer, x.id, caller)
	if err != nil {
		return nil, err
	}
	err = archive.Export(ctx, x.j.b.Blobs, out, options...)
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if grpcerrors.Code(err) == codes.AlreadyExists {
		err = nil // the client wants no more of it
	}
	return answer, err
}
