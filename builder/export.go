package builder

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/util/compression"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/journal"
	"varve.dev/layer"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// writer makes the blobs of an image from trees of the store. It ends with
// publish or abandon.
type writer struct {
	j       *job
	o       imageOptions
	v       *vertex // that the progress is told for
	names   []string
	barrier *durable.Barrier

	ingests   []*content.Ingest
	layers    []*exported
	documents []document
	edges     []layout.Edge
	config    ocispec.Descriptor // of an image for one platform
}

// document is a small blob.
type document struct {
	desc ocispec.Descriptor
	data []byte
}

func (j *job) newWriter(o imageOptions, v *vertex, names []string) *writer {
	return &writer{j: j, o: o, v: v, names: names, barrier: j.b.Root.NewBarrier()}
}

// exported is one layer as a blob.
type exported struct {
	key    layout.SnapshotKey
	id     layout.LayerID
	record layout.LayerRecord
	desc   ocispec.Descriptor
	diffID digest.Digest
	fresh  *content.Ingest    // to be published; nil for a blob that is there
	own    bool               // not what the layer is to be known as from now on
	packed ocispec.Descriptor // a blob of it to compress in another way; none: it is made of the tree
	clamp  *time.Time         // the time of files that are younger
}

// image writes what the exporter wants of a result: a manifest, or an index of
// several, with attestations.
func (w *writer) image(ctx context.Context, b *built) (ocispec.Descriptor, error) {
	own := *b
	own.metadata = maps.Clone(b.metadata)
	b = &own
	for k, v := range w.o.metadata {
		b.metadata[k] = []byte(v)
	}
	notes, err := w.o.annotations.with(b.metadata)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	index := b.perKey
	for _, p := range b.platforms {
		index = index || len(w.attestations(b, p)) > 0
	}
	if err := notes.check(b, w.o, index); err != nil {
		return ocispec.Descriptor{}, err
	}
	if !index {
		p := &b.platforms[0]
		desc, config, err := w.manifest(ctx, b, p, notes)
		if err != nil {
			return desc, err
		}
		w.config = config
		desc.Platform = &p.Platform
		return desc, nil
	}
	if !w.o.oci && len(b.attests) > 0 {
		return ocispec.Descriptor{}, fmt.Errorf("cannot export attestations with \"oci-mediatypes=false\": %w", errdefs.ErrInvalidArgument)
	}
	idx := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: w.media(ocispec.MediaTypeImageIndex),
		Annotations: notes.of(exptypes.AnnotationIndex, nil), Manifests: []ocispec.Descriptor{},
	}
	var attested []ocispec.Descriptor
	for i := range b.platforms {
		p := &b.platforms[i]
		desc, _, err := w.manifest(ctx, b, p, notes)
		if err != nil {
			return desc, err
		}
		desc.Platform = &p.Platform
		idx.Manifests = append(idx.Manifests, desc)
		if list := w.attestations(b, *p); len(list) > 0 {
			a, err := w.attest(ctx, p, desc, list)
			if err != nil {
				return desc, err
			}
			attested = append(attested, a)
		}
	}
	idx.Manifests = append(idx.Manifests, attested...)
	desc, err := w.add(idx.MediaType, idx, idx.Manifests...)
	desc.Annotations = notes.of(exptypes.AnnotationIndexDescriptor, nil)
	return desc, err
}

// media is a media type of OCI's in the dialect that was asked for.
func (w *writer) media(oci string) string {
	if w.o.oci {
		return oci
	}
	switch oci {
	case ocispec.MediaTypeImageIndex:
		return images.MediaTypeDockerSchema2ManifestList
	case ocispec.MediaTypeImageManifest:
		return images.MediaTypeDockerSchema2Manifest
	case ocispec.MediaTypeImageConfig:
		return images.MediaTypeDockerSchema2Config
	}
	return oci
}

// manifest writes the image of one platform.
func (w *writer) manifest(ctx context.Context, b *built, p *exptypes.Platform, notes annotations) (desc, config ocispec.Descriptor, err error) {
	top, err := b.tree(*p)
	if err != nil {
		return desc, config, err
	}
	at, err := b.epoch(w.o.epoch, p)
	if err != nil {
		return desc, config, err
	}
	base, err := baseOf(b, p)
	if err != nil {
		return desc, config, err
	}
	var rewrite *time.Time
	if w.o.rewrite {
		rewrite = at
	}
	layers, err := w.chain(ctx, top, rewrite, base.RootFS.DiffIDs)
	if err != nil {
		return desc, config, err
	}
	configJSON, err := finishConfig(exptypes.ParseKey(b.metadata, exptypes.ExporterImageConfigKey, p), layers, at, base.History)
	if err != nil {
		return desc, config, err
	}
	if w.j.inline && b.refs[b.key(*p)] != nil {
		if configJSON, err = w.withInlineCache(ctx, configJSON, b.refs[b.key(*p)], layers); err != nil {
			return desc, config, err
		}
	}
	config = w.addBytes(w.media(ocispec.MediaTypeImageConfig), configJSON)
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: w.media(ocispec.MediaTypeImageManifest),
		Config: config, Layers: []ocispec.Descriptor{}, Annotations: notes.of(exptypes.AnnotationManifest, &p.Platform),
	}
	unpacked := top != ""
	for _, l := range layers {
		d := l.desc
		if w.o.oci != isOCI(d.MediaType) {
			d.MediaType = compression.ConvertAllLayerMediaTypes(ctx, w.o.oci, d)[0].MediaType
		}
		if !w.o.oci {
			d.Annotations = nil
		}
		m.Layers = append(m.Layers, d)
		unpacked = unpacked && !l.own
	}
	desc, err = w.add(m.MediaType, m, append([]ocispec.Descriptor{config}, m.Layers...)...)
	desc.Annotations = notes.of(exptypes.AnnotationManifestDescriptor, &p.Platform)
	if unpacked {
		w.edges = append(w.edges, layout.Edge{
			Parent: layout.BlobNode(layout.BlobDigest(desc.Digest)), Rel: layout.RelUnpacked, Child: layout.SnapshotNode(top),
		})
	}
	return desc, config, err
}

// withInlineCache adds the cache of an image to its config.
func (w *writer) withInlineCache(ctx context.Context, config []byte, ref *reference, layers []*exported) ([]byte, error) {
	data, err := w.inlineCache(ctx, ref, layers)
	if err != nil {
		return nil, err
	}
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(config, &fields); err != nil {
		return nil, fmt.Errorf("config: %w: %w", err, errdefs.ErrInternal)
	}
	if fields[inlineKey], err = json.Marshal(data); err != nil {
		return nil, fmt.Errorf("config: %w: %w", err, errdefs.ErrInternal)
	}
	return json.Marshal(fields)
}

func isOCI(mediaType string) bool { return !images.IsDockerType(mediaType) }

// baseOf is the config of the image that a result begins with, as the frontend
// tells it.
func baseOf(b *built, p *exptypes.Platform) (base ocispec.Image, err error) {
	if data := exptypes.ParseKey(b.metadata, exptypes.ExporterImageBaseConfigKey, p); len(data) > 0 {
		if err := json.Unmarshal(data, &base); err != nil {
			return base, fmt.Errorf("config of the base image, from the frontend: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	return base, nil
}

// add makes a document, which refers to others.
func (w *writer) add(mediaType string, v any, children ...ocispec.Descriptor) (ocispec.Descriptor, error) {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w: %w", mediaType, err, errdefs.ErrInternal)
	}
	desc := w.addBytes(mediaType, data)
	for _, c := range children {
		w.edges = append(w.edges, layout.Edge{
			Parent: layout.BlobNode(layout.BlobDigest(desc.Digest)), Rel: layout.RelContent, Child: layout.BlobNode(layout.BlobDigest(c.Digest)),
		})
	}
	return desc, nil
}

func (w *writer) addBytes(mediaType string, data []byte) ocispec.Descriptor {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	w.documents = append(w.documents, document{desc, data})
	return desc
}

// chain returns the layers of a chain as blobs, the bottom one first. With an
// epoch files younger than it get its time, but for the layers of the base.
func (w *writer) chain(ctx context.Context, top layout.SnapshotKey, epoch *time.Time, base []digest.Digest) ([]*exported, error) {
	links, err := w.j.chainOf(ctx, top)
	if err != nil {
		return nil, err
	}
	var out []*exported
	for _, l := range links {
		out = append(out, &exported{key: l.snapshot, id: l.layer, record: l.record})
	}
	if err := w.reuse(ctx, out); err != nil {
		return nil, err
	}
	diverged := false
	for i, l := range out {
		switch diverged = diverged || i >= len(base) || base[i] != l.diffID; {
		case epoch != nil && diverged:
			l.desc, l.own, l.clamp = ocispec.Descriptor{}, true, epoch
		case w.o.compression.Force && !w.compressed(l):
			l.packed, l.desc, l.own = l.desc, ocispec.Descriptor{}, true
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for _, l := range out {
		if l.desc.Digest != "" {
			continue
		}
		g.Go(func() error { return w.write(gctx, l) })
	}
	err = g.Wait()
	for _, l := range out {
		if l.fresh != nil {
			w.ingests = append(w.ingests, l.fresh)
		}
	}
	w.layers = append(w.layers, out...)
	return out, err
}

// compressed tells whether a layer is compressed as was asked for.
func (w *writer) compressed(l *exported) bool {
	kind, err := compression.FromMediaType(l.desc.MediaType)
	return err == nil && l.desc.Digest != "" && kind == w.o.compression.Type && w.o.compression.Type != compression.EStargz
}

// reuse finds blobs that the layers have already: those of a pulled image
// whose chain this one begins with, and what a layer was written as before.
// They are held by the build's lease.
func (w *writer) reuse(ctx context.Context, layers []*exported) error {
	for i := len(layers) - 1; i >= 0; i-- {
		m, diffs, ok, err := w.pulled(ctx, layers[i].key)
		if err != nil {
			return err
		}
		if !ok || len(m.Layers) != i+1 || len(diffs) != i+1 {
			continue
		}
		for j := range m.Layers {
			layers[j].desc, layers[j].diffID = m.Layers[j], diffs[j]
		}
		break
	}
	return w.j.lease.Hold(ctx, func(tx *metadata.Tx) ([]layout.Node, error) {
		var nodes []layout.Node
		for _, l := range layers {
			if l.desc.Digest == "" && l.record.Export != nil {
				l.desc, l.diffID = *l.record.Export, digest.Digest(cmp.Or(l.record.ExportDiffID, l.record.DiffID))
			}
			d := layout.BlobDigest(l.desc.Digest)
			if l.desc.Digest == "" || !tx.Blobs().Has(d) {
				l.desc = ocispec.Descriptor{} // written anew
				continue
			}
			nodes = append(nodes, layout.BlobNode(d))
		}
		return nodes, nil
	})
}

// pulled returns the manifest and DiffIDs of an image that has this snapshot
// as its whole chain.
func (w *writer) pulled(ctx context.Context, key layout.SnapshotKey) (m ocispec.Manifest, diffs []digest.Digest, ok bool, err error) {
	var manifest layout.BlobDigest
	err = w.j.b.DB.View(ctx, func(tx *metadata.Tx) error {
		parents, err := tx.Parents(layout.SnapshotNode(key))
		for _, e := range parents {
			if kind, id := e.Parent.Split(); e.Rel == layout.RelUnpacked && kind == layout.KindBlob {
				manifest = layout.BlobDigest(id)
			}
		}
		return err
	})
	if err != nil || manifest == "" {
		return m, nil, false, err
	}
	data, err := w.j.b.Blobs.ReadBlob(ctx, manifest, maxFrontendFile)
	if err == nil {
		err = json.Unmarshal(data, &m)
	}
	if err != nil {
		return m, nil, false, fmt.Errorf("manifest %s: %w", manifest, err)
	}
	data, err = w.j.b.Blobs.ReadBlob(ctx, layout.BlobDigest(m.Config.Digest), maxFrontendFile)
	var image ocispec.Image
	if err == nil {
		err = json.Unmarshal(data, &image)
	}
	return m, image.RootFS.DiffIDs, err == nil, err
}

// write makes the blob of a layer: its tree as a tar stream, or the stream of
// another blob of it, compressed, both hashed on the way.
func (w *writer) write(ctx context.Context, l *exported) error {
	in, err := w.j.b.Blobs.NewIngest(ctx, "export-"+layout.NewID(), "")
	if err != nil {
		return err
	}
	diff := digest.Canonical.Digester()
	compressor, finish := w.o.compression.Type.Compress(ctx, w.o.compression)
	z, err := compressor(in, w.o.compression.Type.MediaType())
	if err == nil {
		err = w.stream(ctx, io.MultiWriter(z, diff.Hash()), l)
		if cerr := z.Close(); err == nil {
			err = cerr // after a failed write it says the same again
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("layer %s: %w", l.id, err), in.Discard())
	}
	l.fresh, l.diffID = in, diff.Digest()
	l.desc = ocispec.Descriptor{MediaType: w.o.compression.Type.MediaType(), Digest: in.Digest().Digest(), Size: in.Size()}
	if finish != nil {
		if l.desc.Annotations, err = finish(ctx, w.j.b.Blobs); err != nil {
			return fmt.Errorf("layer %s: %w", l.id, err)
		}
	}
	if l.clamp != nil {
		if l.desc.Annotations == nil {
			l.desc.Annotations = map[string]string{}
		}
		l.desc.Annotations["buildkit/rewritten-timestamp"] = strconv.FormatInt(l.clamp.Unix(), 10)
	}
	return nil
}

// stream writes a layer as a tar stream.
func (w *writer) stream(ctx context.Context, to io.Writer, l *exported) error {
	if l.packed.Digest == "" {
		parents, err := w.j.b.Snaps.Layers(ctx, l.key)
		if err != nil {
			return err
		}
		return layer.Export(ctx, to, parents[0].Manifest, parents[0].Dir, layer.ExportOptions{Latest: l.clamp})
	}
	blob, err := w.j.b.Blobs.ReaderAt(ctx, l.packed)
	if err != nil {
		return err
	}
	defer blob.Close()
	plain, _, err := layer.Decompress(io.NewSectionReader(blob, 0, blob.Size()))
	if err != nil {
		return err
	}
	defer plain.Close()
	_, err = io.Copy(to, plain)
	return err
}

// abandon throws away what was written, and returns err.
func (w *writer) abandon(err error) error {
	w.barrier.Abandon()
	for _, in := range w.ingests {
		_ = in.Discard() // recovery removes what this leaves
	}
	return err
}

// publish has the blobs in the store: under names, or for as long as the build
// lasts.
func (w *writer) publish(ctx context.Context, root ocispec.Descriptor, names []string) (err error) {
	defer func() {
		if err != nil && !errors.Is(err, journal.ErrIntended) {
			_ = w.abandon(nil)
			return
		}
		for _, in := range w.ingests {
			_ = in.Close()
		}
	}()
	if same, err := w.published(ctx, root, names); err != nil || same {
		return err
	}
	in := layout.IntentRecord{Purpose: "export image " + root.Digest.String(), Edges: w.edges}
	published := map[digest.Digest]bool{}
	for _, l := range w.layers {
		if l.fresh == nil || published[l.desc.Digest] {
			continue
		}
		published[l.desc.Digest] = true
		move, err := l.fresh.Seal(w.barrier, layout.BlobRecord{})
		if err != nil {
			return err
		}
		in.Blobs = append(in.Blobs, move)
	}
	for _, doc := range w.documents {
		if published[doc.desc.Digest] {
			continue
		}
		published[doc.desc.Digest] = true
		move, err := w.stage(ctx, doc)
		if err != nil {
			return err
		}
		in.Blobs = append(in.Blobs, move)
	}
	now := time.Now().UTC()
	for _, name := range names {
		in.Images = append(in.Images, layout.ImageMake{Name: name, Record: layout.ImageRecord{Target: root, Created: now, Updated: now}})
	}
	if len(names) == 0 {
		in.Edges = append(in.Edges, layout.Edge{Parent: w.j.lease.Node(), Rel: layout.RelHolds, Child: layout.BlobNode(layout.BlobDigest(root.Digest))})
	}
	if err := w.j.b.Journal.Publish(ctx, w.barrier, in); err != nil {
		return err
	}
	return w.remember()
}

// published tells whether the image is in the store under all names, as it is
// when everything came from the cache.
func (w *writer) published(ctx context.Context, root ocispec.Descriptor, names []string) (same bool, err error) {
	same = len(names) > 0
	for _, l := range w.layers {
		same = same && l.fresh == nil
	}
	if !same {
		return false, nil
	}
	err = w.j.b.DB.View(ctx, func(tx *metadata.Tx) error {
		for _, name := range names {
			rec, err := tx.Images().Get(name)
			if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
				return err
			}
			same = same && err == nil && rec.Target.Digest == root.Digest
		}
		return nil
	})
	if err != nil || !same {
		return false, err
	}
	return true, w.j.b.DB.Settle(ctx)
}

// stage puts a document into an ingest of its own.
func (w *writer) stage(ctx context.Context, doc document) (layout.BlobMove, error) {
	in, err := w.j.b.Blobs.NewIngest(ctx, "export-"+layout.NewID(), layout.BlobDigest(doc.desc.Digest))
	if err != nil {
		return layout.BlobMove{}, err
	}
	w.ingests = append(w.ingests, in)
	if _, err := io.Copy(in, bytes.NewReader(doc.data)); err != nil {
		return layout.BlobMove{}, err
	}
	return in.Seal(w.barrier, layout.BlobRecord{})
}

// remember notes in the layers' records what they were written as, for the
// next export. A layer that was pulled keeps its DiffID, which images and the
// index know it by.
func (w *writer) remember() error {
	if !slices.ContainsFunc(w.layers, func(l *exported) bool { return l.fresh != nil && !l.own }) {
		return nil
	}
	return w.j.b.DB.Update(context.Background(), func(tx *metadata.Tx) error {
		for _, l := range w.layers {
			if l.fresh == nil || l.own {
				continue
			}
			rec, err := tx.Layers().Get(l.id)
			if errors.Is(err, errdefs.ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			desc, diff := l.desc, layout.DiffID(l.diffID)
			rec.Export, rec.ExportDiffID = &desc, ""
			switch rec.DiffID {
			case "":
				rec.DiffID = diff
			case diff:
			default:
				rec.ExportDiffID = diff
			}
			if err := tx.PutLayer(l.id, rec); err != nil {
				return err
			}
		}
		return nil
	})
}
