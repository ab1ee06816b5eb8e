package builder

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	commonexptypes "github.com/moby/buildkit/exporter/exptypes"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"golang.org/x/sync/errgroup"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// exporter does something with a result.
type exporter interface {
	// title is what the export is called in the progress.
	title() string
	export(ctx context.Context, v *vertex, b *built) (map[string]string, error)
}

// exporters reads what is to be done with the result.
func (j *job) exporters() (out []exporter, err error) {
	for id, e := range j.req.Exports {
		var x exporter
		switch e.Type {
		case client.ExporterImage:
			x, err = newImageExporter(j, e.Attrs)
		case client.ExporterOCI, client.ExporterDocker:
			x, err = newArchiveExporter(j, id, e.Type, e.Attrs)
		case client.ExporterLocal, client.ExporterTar:
			x, err = newFilesExporter(j, id, e.Type, e.Attrs)
		default:
			err = fmt.Errorf("exporter %q is not known here: %w", e.Type, errdefs.ErrNotFound)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, x)
	}
	return out, nil
}

// finish exports a result to wherever it was asked for.
func (j *job) finish(ctx context.Context, res *gwclient.Result, exporters []exporter) (Response, error) {
	out := Response{Exported: map[string]string{}}
	if res == nil {
		return out, nil
	}
	for k, v := range res.Metadata {
		if strings.HasPrefix(k, "frontend.") {
			out.Exported[k] = string(v)
		}
	}
	if len(exporters) == 0 {
		return out, nil
	}
	b, err := j.built(ctx, res)
	if err != nil {
		return out, err
	}
	answers := make([]map[string]string, len(exporters))
	group, ctx := errgroup.WithContext(ctx)
	for i, x := range exporters {
		group.Go(func() (err error) {
			name := x.title()
			if i > 0 {
				name += " " + strconv.Itoa(i+1)
			}
			v := j.progress.own(name)
			j.progress.begin(v)
			answers[i], err = x.export(ctx, v, b)
			j.progress.end(v, err)
			return err
		})
	}
	err = group.Wait()
	for _, a := range answers {
		maps.Copy(out.Exported, a)
	}
	return out, err
}

// built is a result with all its trees.
type built struct {
	metadata  map[string][]byte
	platforms []exptypes.Platform
	perKey    bool // one tree for each platform, in trees; else that of ""
	trees     map[string]layout.SnapshotKey
	refs      map[string]*reference
	attests   map[string][]gwclient.Attestation
}

// built finds the trees of a result whose references were solved.
func (j *job) built(ctx context.Context, res *gwclient.Result) (*built, error) {
	b := &built{
		metadata: orEmptyBytes(res.Metadata), perKey: len(res.Refs) > 0,
		trees: map[string]layout.SnapshotKey{}, refs: map[string]*reference{}, attests: res.Attestations,
	}
	if _, ok := b.metadata[exptypes.ExporterPlatformsKey]; b.perKey && !ok {
		return nil, fmt.Errorf("unable to export multiple refs, missing platforms mapping: %w", errdefs.ErrInvalidArgument)
	}
	ps, err := exptypes.ParsePlatforms(b.metadata)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	b.platforms = ps.Platforms
	if !b.perKey && len(b.platforms) > 1 {
		return nil, fmt.Errorf("cannot export multiple platforms without multi-platform enabled: %w", errdefs.ErrInvalidArgument)
	}
	refs := res.Refs
	if !b.perKey {
		refs = map[string]gwclient.Reference{"": res.Ref}
	}
	for key, ref := range refs {
		r, ok := ref.(*reference)
		if !ok || r == nil {
			b.trees[key] = ""
			continue
		}
		j.sendWhole(r)
		b.refs[key] = r
		if b.trees[key], err = r.snapshot(ctx); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func orEmptyBytes(m map[string][]byte) map[string][]byte {
	if m == nil {
		return map[string][]byte{}
	}
	return m
}

// key is the key of a platform's tree.
func (b *built) key(p exptypes.Platform) string {
	if b.perKey {
		return p.ID
	}
	return ""
}

// tree is the tree for a platform.
func (b *built) tree(p exptypes.Platform) (layout.SnapshotKey, error) {
	key := b.key(p)
	tree, ok := b.trees[key]
	if !ok && len(b.trees) == 1 {
		for _, tree = range b.trees {
			ok = true
		}
	}
	if !ok {
		return "", fmt.Errorf("failed to find ref for ID %s: %w", p.ID, errdefs.ErrInvalidArgument)
	}
	return tree, nil
}

// epoch is the time that a platform's files and documents are not to be younger
// than: what the exporter was told, or what the frontend says. Nil if nobody
// says any.
func (b *built) epoch(told *epoch, p *exptypes.Platform) (*time.Time, error) {
	if told != nil {
		return told.at, nil
	}
	keys := []string{commonexptypes.ExporterEpochKey}
	if p != nil {
		keys = append([]string{commonexptypes.ExporterEpochKey + "/" + p.ID}, keys...)
	}
	for _, key := range keys {
		if v, ok := b.metadata[key]; ok {
			at, err := parseEpoch(string(v))
			if err != nil {
				return nil, fmt.Errorf("invalid SOURCE_DATE_EPOCH from frontend: %q: %w", v, errdefs.ErrInvalidArgument)
			}
			return at, nil
		}
	}
	return nil, nil
}

// epoch is what an exporter was told; at is nil where it was told that there is
// none.
type epoch struct{ at *time.Time }

// parseEpoch reads seconds since 1970; nil for "".
func parseEpoch(s string) (*time.Time, error) {
	if s == "" {
		return nil, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return nil, err
	}
	t := time.Unix(n, 0).UTC()
	return &t, nil
}

// attrs reads an exporter's attributes, each once.
type attrs struct {
	exporter string
	left     map[string]string
	err      error
}

func newAttrs(exporter string, m map[string]string) *attrs {
	return &attrs{exporter: exporter, left: maps.Clone(orEmpty(m))}
}

func (a *attrs) take(key string) (string, bool) {
	v, ok := a.left[key]
	delete(a.left, key)
	return v, ok
}

func (a *attrs) text(key string) string {
	v, _ := a.take(key)
	return v
}

// flag is a boolean; its name alone means true. Nil if it was not given.
func (a *attrs) flag(key string) *bool {
	v, ok := a.take(key)
	if !ok {
		return nil
	}
	b := true
	if v != "" {
		var err error
		if b, err = strconv.ParseBool(v); err != nil && a.err == nil {
			a.err = fmt.Errorf("exporter %s: non-bool value specified for %s: %w", a.exporter, key, errdefs.ErrInvalidArgument)
		}
	}
	return &b
}

func (a *attrs) is(key string, otherwise bool) bool {
	if b := a.flag(key); b != nil {
		return *b
	}
	return otherwise
}

func (a *attrs) epoch() *epoch {
	v, ok := a.take(string(commonexptypes.OptKeySourceDateEpoch))
	if !ok {
		return nil
	}
	at, err := parseEpoch(v)
	if err != nil && a.err == nil {
		a.err = fmt.Errorf("exporter %s: invalid %s %q: %w", a.exporter, commonexptypes.OptKeySourceDateEpoch, v, errdefs.ErrInvalidArgument)
	}
	return &epoch{at}
}

// IsEpoch tells whether a value of SOURCE_DATE_EPOCH is a time, or none: the
// Dockerfile frontend knows others.
func IsEpoch(s string) bool {
	_, err := parseEpoch(s)
	return err == nil
}
