package builder

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	gwclient "github.com/moby/buildkit/frontend/gateway/client"
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

// configKey is where the frontend leaves the image's config (BuildKit,
// exporter/containerimage/exptypes).
const configKey = "containerimage.config"

// finish solves what the frontend wants and exports it.
func (s *session) finish(ctx context.Context, res *gwclient.Result) (Result, error) {
	ref, err := res.SingleRef()
	if err != nil {
		return Result{}, fmt.Errorf("images for several platforms at once: %w: %w", err, errdefs.ErrNotImplemented)
	}
	var top layout.SnapshotKey
	if r, ok := ref.(*reference); ok && r != nil {
		if top, err = s.solve(ctx, r.graph, r.graph.root); err != nil {
			return Result{}, err
		}
	}
	out, err := s.export(ctx, top, res.Metadata[configKey])
	s.mu.Lock()
	defer s.mu.Unlock()
	out.Steps, out.Cached, out.Ran = s.steps, s.cached, s.ran
	return out, err
}

// export makes an image of the chain that ends in top, under the session's
// names.
func (s *session) export(ctx context.Context, top layout.SnapshotKey, config []byte) (Result, error) {
	x := &export{s: s, barrier: s.b.Root.NewBarrier()}
	out, err := x.image(ctx, top, config)
	if err != nil {
		x.barrier.Abandon()
	}
	for _, in := range x.ingests {
		if err != nil && !errors.Is(err, journal.ErrIntended) {
			_ = in.Discard() // recovery removes what this leaves
		} else {
			_ = in.Close()
		}
	}
	return out, err
}

// export makes an image of a snapshot.
type export struct {
	s       *session
	barrier *durable.Barrier
	ingests []*content.Ingest
}

// exported is one layer as a blob.
type exported struct {
	key    layout.SnapshotKey
	id     layout.LayerID
	record layout.LayerRecord
	desc   ocispec.Descriptor
	diffID digest.Digest
	fresh  *content.Ingest // to be published; nil for a blob that is there
}

func (x *export) image(ctx context.Context, top layout.SnapshotKey, config []byte) (Result, error) {
	layers, err := x.layers(ctx, top)
	if err != nil {
		return Result{}, err
	}
	configJSON, err := finishConfig(config, layers)
	if err != nil {
		return Result{}, err
	}
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: descriptorOf(ocispec.MediaTypeImageConfig, configJSON), Layers: []ocispec.Descriptor{},
	}
	for _, l := range layers {
		manifest.Layers = append(manifest.Layers, l.desc)
	}
	manifestJSON, err := json.Marshal(manifest)
	if err != nil {
		return Result{}, fmt.Errorf("manifest: %w: %w", err, errdefs.ErrInternal)
	}
	desc := descriptorOf(ocispec.MediaTypeImageManifest, manifestJSON)
	if err := x.publish(ctx, top, desc, manifest, layers, [][]byte{configJSON, manifestJSON}); err != nil {
		return Result{}, err
	}
	return Result{Manifest: desc, Config: manifest.Config}, nil
}

func descriptorOf(mediaType string, data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

// layers returns the layers of a chain as blobs, the bottom one first.
func (x *export) layers(ctx context.Context, top layout.SnapshotKey) ([]*exported, error) {
	var out []*exported
	err := x.s.b.DB.View(ctx, func(tx *metadata.Tx) error {
		out = nil
		for at := top; at != ""; {
			snap, err := tx.Snapshots().Get(at)
			if err != nil {
				return err
			}
			rec, err := tx.Layers().Get(snap.Layer)
			if err != nil {
				return err
			}
			out = append(out, &exported{key: at, id: snap.Layer, record: rec})
			at = snap.Parent
		}
		slices.Reverse(out)
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := x.reuse(ctx, out); err != nil {
		return nil, err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for _, l := range out {
		if l.desc.Digest == "" {
			g.Go(func() error { return x.write(gctx, l) })
		}
	}
	err = g.Wait()
	for _, l := range out {
		if l.fresh != nil {
			x.ingests = append(x.ingests, l.fresh)
		}
	}
	return out, err
}

// reuse finds blobs that the layers have already: those of a pulled image
// whose chain this one begins with, and what a layer was written as before.
// They are held by the build's lease.
func (x *export) reuse(ctx context.Context, layers []*exported) error {
	for i := len(layers) - 1; i >= 0; i-- {
		m, diffs, ok, err := x.pulled(ctx, layers[i].key)
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
	return x.s.lease.Hold(ctx, func(tx *metadata.Tx) ([]layout.Node, error) {
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
func (x *export) pulled(ctx context.Context, key layout.SnapshotKey) (m ocispec.Manifest, diffs []digest.Digest, ok bool, err error) {
	var manifest layout.BlobDigest
	err = x.s.b.DB.View(ctx, func(tx *metadata.Tx) error {
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
	data, err := x.s.b.Blobs.ReadBlob(ctx, manifest, maxFrontendFile)
	if err == nil {
		err = json.Unmarshal(data, &m)
	}
	if err != nil {
		return m, nil, false, fmt.Errorf("manifest %s: %w", manifest, err)
	}
	data, err = x.s.b.Blobs.ReadBlob(ctx, layout.BlobDigest(m.Config.Digest), maxFrontendFile)
	var image ocispec.Image
	if err == nil {
		err = json.Unmarshal(data, &image)
	}
	return m, image.RootFS.DiffIDs, err == nil, err
}

// write makes the blob of a layer: its tree as a tar stream, compressed, both
// hashed on the way.
func (x *export) write(ctx context.Context, l *exported) error {
	parents, err := x.s.b.Snaps.Layers(ctx, l.key)
	if err != nil {
		return err
	}
	in, err := x.s.b.Blobs.NewIngest(ctx, "export-"+string(l.id), "")
	if err != nil {
		return err
	}
	diff := digest.Canonical.Digester()
	z, err := layer.Compress(in, layer.Gzip)
	if err == nil {
		err = layer.Export(ctx, io.MultiWriter(z, diff.Hash()), parents[0].Manifest, parents[0].Dir)
		if cerr := z.Close(); err == nil {
			err = cerr // after a failed write it says the same again
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("layer %s: %w", l.id, err), in.Discard())
	}
	l.fresh, l.diffID = in, diff.Digest()
	l.desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: in.Digest().Digest(), Size: in.Size()}
	return nil
}

// finishConfig completes the frontend's config with what only the export
// knows. Times are those of the layers, so that a build that finds everything
// in the cache gives the same image again.
func finishConfig(config []byte, layers []*exported) ([]byte, error) {
	fields := map[string]json.RawMessage{}
	var image ocispec.Image
	if len(config) > 0 {
		if err := errors.Join(json.Unmarshal(config, &fields), json.Unmarshal(config, &image)); err != nil {
			return nil, fmt.Errorf("config from the frontend: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	rootfs := ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}
	last := time.Unix(0, 0).UTC()
	for _, l := range layers {
		rootfs.DiffIDs = append(rootfs.DiffIDs, l.diffID)
		if l.record.Created.After(last) {
			last = l.record.Created
		}
	}
	set := func(name string, v any) error {
		data, err := json.Marshal(v)
		fields[name] = data
		return err
	}
	err := errors.Join(set("rootfs", rootfs), set("history", history(image.History, layers, last)), set("created", last))
	if err != nil {
		return nil, fmt.Errorf("config: %w: %w", err, errdefs.ErrInternal)
	}
	return json.Marshal(fields) // names in order
}

// history gives each layer one entry that is not empty, and each entry a time.
func history(list []ocispec.History, layers []*exported, last time.Time) []ocispec.History {
	out := slices.Clone(list)
	next := 0
	for i := range out {
		when := last
		if !out[i].EmptyLayer {
			if next < len(layers) {
				when = layers[next].record.Created
			} else {
				out[i].EmptyLayer = true // the step made no layer after all
			}
			next++
		}
		if out[i].Created == nil {
			out[i].Created = &when
		}
	}
	for ; next < len(layers); next++ {
		out = append(out, ocispec.History{Created: &layers[next].record.Created, CreatedBy: "varve"})
	}
	return out
}

// publish makes the image visible under the build's names.
func (x *export) publish(ctx context.Context, top layout.SnapshotKey, desc ocispec.Descriptor, m ocispec.Manifest, layers []*exported, documents [][]byte) error {
	in := layout.IntentRecord{Purpose: "export image " + desc.Digest.String()}
	published := map[digest.Digest]bool{}
	for _, l := range layers {
		if l.fresh == nil || published[l.desc.Digest] {
			continue
		}
		published[l.desc.Digest] = true
		move, err := l.fresh.Seal(x.barrier, layout.BlobRecord{})
		if err != nil {
			return err
		}
		in.Blobs = append(in.Blobs, move)
	}
	for _, data := range documents {
		move, err := x.document(ctx, data)
		if err != nil {
			return err
		}
		in.Blobs = append(in.Blobs, move)
	}
	from := layout.BlobNode(layout.BlobDigest(desc.Digest))
	link := func(rel string, child layout.Node) {
		in.Edges = append(in.Edges, layout.Edge{Parent: from, Rel: rel, Child: child})
	}
	link(layout.RelContent, layout.BlobNode(layout.BlobDigest(m.Config.Digest)))
	for _, l := range m.Layers {
		link(layout.RelContent, layout.BlobNode(layout.BlobDigest(l.Digest)))
	}
	if top != "" {
		link(layout.RelUnpacked, layout.SnapshotNode(top))
	}
	now := time.Now().UTC()
	names := x.s.req.Names
	if len(names) == 0 {
		names = []string{"<none>@" + desc.Digest.String()}
	}
	for _, name := range names {
		in.Images = append(in.Images, layout.ImageMake{Name: name, Record: layout.ImageRecord{Target: desc, Created: now, Updated: now}})
	}
	if err := x.s.b.Journal.Publish(ctx, x.barrier, in); err != nil {
		return err
	}
	return x.remember(layers)
}

// document puts a small blob into an ingest of its own.
func (x *export) document(ctx context.Context, data []byte) (layout.BlobMove, error) {
	d := digest.FromBytes(data)
	in, err := x.s.b.Blobs.NewIngest(ctx, "export-"+d.String(), layout.BlobDigest(d))
	if err != nil {
		return layout.BlobMove{}, err
	}
	x.ingests = append(x.ingests, in)
	if _, err := io.Copy(in, bytes.NewReader(data)); err != nil {
		return layout.BlobMove{}, errors.Join(err, in.Discard())
	}
	return in.Seal(x.barrier, layout.BlobRecord{})
}

// remember notes in the layers' records what they were written as, for the
// next export. A layer that was pulled keeps its DiffID, which images and the
// index know it by.
func (x *export) remember(layers []*exported) error {
	return x.s.b.DB.Update(context.Background(), func(tx *metadata.Tx) error {
		for _, l := range layers {
			if l.fresh == nil {
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
