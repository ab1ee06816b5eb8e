package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/journal"
	"varve.dev/layer"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// treeUnpacker publishes real layers: package layer's trees under staging,
// their file manifests as blobs, a snapshot for each prefix of the chain.
type treeUnpacker struct {
	root    *durable.Root
	db      *metadata.DB
	journal *journal.Journal
	blobs   *content.Store
}

type treeUnpack struct {
	*treeUnpacker
	barrier *durable.Barrier
	chain   []layout.DiffID

	mu     sync.Mutex
	layers []treeLayer
}

type treeLayer struct {
	stands   bool
	id       layout.LayerID
	staging  string
	applied  *layer.Applied
	manifest *layer.Manifest
	ingest   *content.Ingest
}

func (u *treeUnpacker) Begin(ctx context.Context, lease *metadata.Lease, chain []layout.DiffID, barrier *durable.Barrier) (Unpack, error) {
	p := &treeUnpack{treeUnpacker: u, barrier: barrier, chain: chain, layers: make([]treeLayer, len(chain))}
	return p, lease.Hold(ctx, func(tx *metadata.Tx) (nodes []layout.Node, err error) {
		for i := range chain {
			for _, key := range []string{layout.DiffKey(chain[i]), layout.ChainKey(p.chainID(i))} {
				id, _, err := tx.LayerByKey(key)
				if err == nil {
					p.layers[i] = treeLayer{stands: true, id: id}
					nodes = append(nodes, layout.LayerNode(id))
				} else if !errors.Is(err, errdefs.ErrNotFound) {
					return nil, err
				}
			}
		}
		return nodes, nil
	})
}

func (p *treeUnpack) chainID(i int) layout.ChainID {
	var ids []digest.Digest
	for _, d := range p.chain[:i+1] {
		ids = append(ids, digest.Digest(d))
	}
	return layout.ChainID(identity.ChainID(ids))
}

func (p *treeUnpack) Missing() (missing []bool) {
	for _, l := range p.layers {
		missing = append(missing, !l.stands)
	}
	return missing
}

func (p *treeUnpack) Layer(ctx context.Context, i int, tar io.Reader) error {
	id, staging, err := p.journal.NewStaging()
	if err != nil {
		return err
	}
	if err := p.root.Mkdir(staging+"/"+layout.TreeDir, 0o755); err != nil {
		return err
	}
	tree, err := p.root.NewTree(staging+"/"+layout.TreeDir, p.barrier)
	if err != nil {
		return err
	}
	applied, err := layer.Apply(ctx, tar, tree)
	if err != nil {
		return errors.Join(err, tree.Close())
	}
	if applied.DiffID != p.chain[i] {
		return fmt.Errorf("the stream has the digest %s, the config says %s: %w", applied.DiffID, p.chain[i], errdefs.ErrFailedPrecondition)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.layers[i] = treeLayer{id: id, staging: staging, applied: applied}
	return nil
}

func (p *treeUnpack) Finish(ctx context.Context, in *layout.IntentRecord) (top layout.SnapshotKey, err error) {
	var below []layer.Parent
	for i := range p.layers {
		l := &p.layers[i]
		if err := p.finish(ctx, i, l, below, in); err != nil {
			return "", err
		}
		dir := p.root.Path(l.staging + "/" + layout.TreeDir)
		if l.stands {
			dir = p.root.Path(layout.LayerPath(l.id) + "/" + layout.TreeDir)
		}
		below = append([]layer.Parent{{Manifest: l.manifest, Dir: dir}}, below...)
		key := layout.SnapshotKey(p.chainID(i))
		in.Snapshots = append(in.Snapshots, layout.SnapshotMake{Key: key, Record: layout.SnapshotRecord{
			Kind: layout.SnapshotCommitted, Parent: top, Layer: l.id}})
		top = key
	}
	return top, nil
}

func (p *treeUnpack) finish(ctx context.Context, i int, l *treeLayer, below []layer.Parent, in *layout.IntentRecord) error {
	if l.stands {
		return p.readManifest(ctx, l)
	}
	rec := layout.LayerRecord{DiffID: p.chain[i]}
	if l.applied.Unresolved() {
		rec.ChainID = p.chainID(i)
		if err := l.applied.Resolve(slices.Clone(below)); err != nil {
			return err
		}
	}
	var err error
	l.manifest, err = layer.Walk(ctx, p.root.Path(l.staging+"/"+layout.TreeDir), layer.WalkOptions{Sums: l.applied.Sums()})
	if err != nil {
		return err
	}
	var data bytes.Buffer
	if err := l.manifest.Encode(&data); err != nil {
		return err
	}
	if l.ingest, err = p.blobs.OpenIngest(ctx, "files-"+string(l.id), "", 0); err != nil {
		return err
	}
	if err := write(l.ingest, data.Bytes()); err != nil {
		return err
	}
	move, err := l.ingest.Seal(p.barrier, layout.BlobRecord{})
	if err != nil {
		return err
	}
	rec.Manifest = move.Digest
	rec.Size, rec.Inodes = l.manifest.Usage()
	in.Blobs = append(in.Blobs, move)
	in.Layers = append(in.Layers, layout.LayerMove{ID: l.id, From: l.staging, Record: rec})
	return nil
}

func (p *treeUnpack) readManifest(ctx context.Context, l *treeLayer) error {
	var rec layout.LayerRecord
	err := p.db.View(ctx, func(tx *metadata.Tx) (err error) {
		rec, err = tx.Layers().Get(l.id)
		return err
	})
	if err != nil {
		return err
	}
	data, err := p.blobs.ReadBlob(ctx, rec.Manifest, 1<<30)
	if err != nil {
		return err
	}
	l.manifest, err = layer.Decode(bytes.NewReader(data))
	return err
}

func (p *treeUnpack) Abandon() {
	for _, l := range p.layers {
		if l.ingest != nil {
			l.ingest.Close()
		}
		if l.staging != "" {
			p.journal.Discard(l.staging)
		}
	}
}

// withTrees makes the store unpack for real.
func (o *opened) withTrees(t testing.TB) *opened {
	t.Helper()
	o.Store.unpacker = &treeUnpacker{o.root, o.db, o.journal, o.blobs}
	return o
}
