package builder

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/containerd/containerd/v2/pkg/labels"
	cachetypes "github.com/moby/buildkit/cache/remotecache/v1/types"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/session/content"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// memoryBlob reads a document in memory.
type memoryBlob struct{ *bytes.Reader }

func newMemoryBlob(data []byte) *memoryBlob { return &memoryBlob{bytes.NewReader(data)} }

func (*memoryBlob) Close() error { return nil }

// cacheExport is a place that cache is left in.
type cacheExport struct {
	option      CacheOption
	max         bool // the results of all steps, not only of those in the image
	ignoreError bool
	compression compression.Config
}

// cacheExports reads where cache is to be left. Inline cache goes into images and
// is no place of its own.
func (j *job) cacheExports() (out []*cacheExport, err error) {
	seen := map[string]bool{}
	for _, o := range j.req.CacheTo {
		if o.Type == "inline" {
			j.inline = true
			continue
		}
		x := &cacheExport{option: o, max: o.Attrs["mode"] == "max"}
		if x.compression, err = compression.ParseAttributes(o.Attrs); err != nil {
			return nil, fmt.Errorf("cache exporter %s: %w: %w", o.Type, err, errdefs.ErrInvalidArgument)
		}
		x.ignoreError, _ = strconv.ParseBool(o.Attrs["ignore-error"])
		want := map[string]string{"registry": "ref", "local": "dest"}[o.Type]
		if want == "" {
			return nil, fmt.Errorf("unknown cache exporter: %q: %w", o.Type, errdefs.ErrNotFound)
		}
		if o.Attrs[want] == "" {
			return nil, fmt.Errorf("cache exporter %s: %s is missing: %w", o.Type, want, errdefs.ErrInvalidArgument)
		}
		id := o.Type + " " + o.Attrs[want]
		if seen[id] {
			return nil, fmt.Errorf("duplicate cache exports %s: %w", id, errdefs.ErrInvalidArgument)
		}
		seen[id] = true
		out = append(out, x)
	}
	return out, nil
}

// exportCache leaves the cache of a result's steps where it was asked for.
func (j *job) exportCache(ctx context.Context, res *gwclient.Result, all []*cacheExport, answer map[string]string) error {
	for _, x := range all {
		v := j.progress.own("exporting cache to " + map[string]string{"registry": "registry", "local": "client directory"}[x.option.Type])
		j.progress.begin(v)
		desc, err := j.exportCacheTo(ctx, v, res, x)
		j.progress.end(v, err)
		if err != nil {
			if x.ignoreError && ctx.Err() == nil {
				continue
			}
			return fmt.Errorf("failed to export cache: %w", err)
		}
		data, err := json.Marshal(desc)
		if err != nil {
			return fmt.Errorf("cache manifest: %w: %w", err, errdefs.ErrInternal)
		}
		answer["cache.manifest"] = string(data)
	}
	return nil
}

func (j *job) exportCacheTo(ctx context.Context, v *vertex, res *gwclient.Result, x *cacheExport) (desc ocispec.Descriptor, err error) {
	w := j.newWriter(imageOptions{oci: x.option.Attrs["oci-mediatypes"] != "false", compression: x.compression}, v, nil)
	desc, err = w.cache(ctx, res, x.max)
	if err != nil {
		return desc, w.abandon(err)
	}
	if err := w.publish(ctx, desc, nil); err != nil {
		return desc, err
	}
	if x.option.Type == "registry" {
		return desc, j.req.Images.Push(ctx, x.option.Attrs["ref"], desc, false)
	}
	caller, err := j.caller(ctx, "")
	if err != nil {
		return desc, err
	}
	return desc, contentutil.CopyChain(ctx, content.NewCallerStore(caller, "local:"+x.option.Attrs["dest"]), j.b.Blobs, desc)
}

// cache writes a manifest of a cache: its config, and the layers of all results.
func (w *writer) cache(ctx context.Context, res *gwclient.Result, max bool) (desc ocispec.Descriptor, err error) {
	rows, err := w.j.cacheRows(ctx, res, max)
	if err != nil {
		return desc, err
	}
	set := newCacheSet()
	for _, key := range slices.Sorted(maps.Keys(rows)) {
		row := rows[key]
		layer := -1
		if row.snapshot != "" {
			chain, err := w.chain(ctx, row.snapshot, nil, nil)
			if err != nil {
				return desc, err
			}
			layer = set.chain(chain)
		}
		set.record(key, row.alias, layer)
	}
	config, err := json.Marshal(set.finish())
	if err != nil {
		return desc, fmt.Errorf("cache config: %w: %w", err, errdefs.ErrInternal)
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: w.media(ocispec.MediaTypeImageManifest),
		Config: w.addBytes(cachetypes.CacheConfigMediaTypeV0, config), Layers: set.blobs,
	}
	if m.Layers == nil {
		m.Layers = []ocispec.Descriptor{}
	}
	return w.add(m.MediaType, m, append([]ocispec.Descriptor{m.Config}, m.Layers...)...)
}

// inlineCache is the cache of an image's own layers, for its config.
func (w *writer) inlineCache(ctx context.Context, ref *reference, layers []*exported) ([]byte, error) {
	rows, err := w.j.cacheRows(ctx, &gwclient.Result{Ref: ref}, false)
	if err != nil {
		return nil, err
	}
	at := map[layout.SnapshotKey]int{}
	set := newCacheSet()
	for i, l := range layers {
		at[l.key] = i
	}
	set.chain(layers)
	for _, key := range slices.Sorted(maps.Keys(rows)) {
		row := rows[key]
		layer, ok := at[row.snapshot]
		if !ok {
			layer = -1
		}
		set.record(key, row.alias, layer)
	}
	return json.Marshal(set.finish())
}

// cacheRow is what the cache has under a key: a result, another key, or nothing that
// is exported.
type cacheRow struct {
	snapshot layout.SnapshotKey
	alias    string
}

// cacheRows are the rows of the steps that a result came to be by: of those whose
// tree is a part of it, or of all.
func (j *job) cacheRows(ctx context.Context, res *gwclient.Result, max bool) (map[string]cacheRow, error) {
	rows := map[string]cacheRow{}
	var err error
	add := func(r gwclient.Reference) error {
		ref, ok := r.(*reference)
		if !ok || ref == nil || err != nil {
			return nil
		}
		err = j.addRows(ctx, ref, max, rows)
		return nil
	}
	_ = res.EachRef(add)
	return rows, err
}

func (j *job) addRows(ctx context.Context, ref *reference, max bool, rows map[string]cacheRow) error {
	top, err := ref.snapshot(ctx)
	if err != nil {
		return err
	}
	chain, err := j.chainOf(ctx, top)
	if err != nil {
		return err
	}
	for _, v := range ref.graph.vertices {
		if v.op.Op == nil || v.op.GetSource() != nil {
			continue
		}
		key, err := j.keyWithoutSolving(ctx, ref.graph, v)
		if err != nil || key == "" {
			continue
		}
		rec, err := j.row(ctx, key, chain)
		if err != nil {
			return err
		}
		result := rec
		if rec.Alias != "" {
			if result, err = j.row(ctx, rec.Alias, chain); err != nil {
				return err
			}
		}
		// What a key stands for goes into the keys of the steps above, whether
		// its own result is wanted or not.
		if rec.Alias != "" {
			rows[key] = cacheRow{alias: rec.Alias}
			key = rec.Alias
			rows[key] = cacheRow{}
		}
		if len(result.Snapshots) == 1 && result.Snapshots[0] != "" && (max || chain.has(result.Snapshots[0])) {
			rows[key] = cacheRow{snapshot: result.Snapshots[0]}
		}
	}
	return nil
}

// chainLayers are the layers of a tree, the bottom one first.
type chainLayers []chainLayer

type chainLayer struct {
	snapshot layout.SnapshotKey
	layer    layout.LayerID
	record   layout.LayerRecord
}

func (c chainLayers) has(snap layout.SnapshotKey) bool {
	for _, l := range c {
		if l.snapshot == snap {
			return true
		}
	}
	return false
}

func (j *job) chainOf(ctx context.Context, top layout.SnapshotKey) (out chainLayers, err error) {
	err = j.b.DB.View(ctx, func(tx *metadata.Tx) error {
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
			out = append(out, chainLayer{at, snap.Layer, rec})
			at = snap.Parent
		}
		slices.Reverse(out)
		return nil
	})
	return out, err
}

// row is what the cache has under a key, or what an imported cache has that the
// build did not have to bring: there its result may be a part of the tree.
func (j *job) row(ctx context.Context, key string, chain chainLayers) (layout.CacheRecord, error) {
	rec, err := j.cached(ctx, key)
	if err != nil || rec.Alias != "" || len(rec.Snapshots) > 0 {
		return rec, err
	}
	c, imported, ok := j.imported(ctx, key)
	if !ok {
		return rec, nil
	}
	rec.Alias = imported.alias
	var diffs []layout.DiffID
	for at := imported.layer; at >= 0; at = c.layers[at].parent {
		diffs = append(diffs, layout.DiffID(c.layers[at].diffID))
	}
	slices.Reverse(diffs)
	if len(diffs) == 0 || len(diffs) > len(chain) {
		return rec, nil
	}
	for i, d := range diffs {
		if chain[i].record.DiffID != d {
			return rec, nil
		}
	}
	rec.Snapshots = []layout.SnapshotKey{chain[len(diffs)-1].snapshot}
	return rec, nil
}

// cacheSet puts a cache's config together.
type cacheSet struct {
	config cachetypes.CacheConfig
	blobs  []ocispec.Descriptor
	known  map[string]int // layers by what they stand on
	seen   map[digest.Digest]bool
	at     map[string]int // records by key
	alias  map[int]string
}

func newCacheSet() *cacheSet {
	return &cacheSet{known: map[string]int{}, seen: map[digest.Digest]bool{}, at: map[string]int{}, alias: map[int]string{}}
}

// chain adds the layers of a tree and returns the number of the topmost; -1 for a
// tree without any.
func (s *cacheSet) chain(layers []*exported) int {
	parent := -1
	for _, l := range layers {
		id := fmt.Sprint(parent, " ", l.desc.Digest)
		n, ok := s.known[id]
		if !ok {
			n = len(s.config.Layers)
			s.known[id] = n
			s.config.Layers = append(s.config.Layers, cachetypes.CacheLayer{Blob: l.desc.Digest, ParentIndex: parent})
		}
		if !s.seen[l.desc.Digest] {
			s.seen[l.desc.Digest] = true
			desc := l.desc
			desc.Annotations = maps.Clone(desc.Annotations)
			if desc.Annotations == nil {
				desc.Annotations = map[string]string{}
			}
			desc.Annotations[labels.LabelUncompressed] = l.diffID.String()
			s.blobs = append(s.blobs, desc)
		}
		parent = n
	}
	return parent
}

func (s *cacheSet) record(key, alias string, layer int) {
	n := len(s.config.Records)
	r := cachetypes.CacheRecord{Digest: digest.NewDigestFromEncoded(digest.SHA256, key)}
	switch {
	case alias != "":
		s.alias[n] = alias
	case layer >= 0:
		r.Results = []cachetypes.CacheResult{{LayerIndex: layer}}
	}
	s.at[key] = n
	s.config.Records = append(s.config.Records, r)
}

// finish links aliases to what they stand for.
func (s *cacheSet) finish() cachetypes.CacheConfig {
	for n, alias := range s.alias {
		if to, ok := s.at[alias]; ok {
			s.config.Records[n].Inputs = [][]cachetypes.CacheInput{{{LinkIndex: to}}}
		}
	}
	return s.config
}
