package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/internal/budget"
	"varve.dev/layer"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// Unpack is one image's layers on their way from tar streams to trees: see
// [Snapshotter.Begin]. Layers may be unpacked from several goroutines; the
// rest belongs to one.
type Unpack struct {
	snap    *Snapshotter
	barrier *durable.Barrier
	chain   []layout.DiffID
	keys    []layout.SnapshotKey // of the snapshots, by ChainID
	have    int                  // so many snapshots, from the bottom, exist
	space   *budget.Claim        // of the new trees, until they are recorded or gone

	mu     sync.Mutex
	layers []place
	done   bool
}

// place is where one layer of the chain is.
type place struct {
	id       layout.LayerID
	exists   bool   // committed before
	bytes    int64  // that were claimed for it
	staging  string // otherwise: where it is being unpacked
	manifest string // the place of its file manifest, likewise
	tree     *durable.Tree
	applied  *layer.Applied
	files    *layer.Manifest // of a finished tree
}

// Begin prepares to unpack an image whose layers have these DiffIDs, the
// bottom one first. What of them stands already is held by lease. The files of
// the new trees go into barrier.
//
// An image's snapshots are named by their ChainIDs. A layer's tree is looked
// up by its DiffID, so that images with other layers below share it, or by the
// ChainID if it took something from its parents.
func (s *Snapshotter) Begin(ctx context.Context, lease *metadata.Lease, chain []layout.DiffID, barrier *durable.Barrier) (*Unpack, error) {
	u := &Unpack{snap: s, barrier: barrier, chain: chain, layers: make([]place, len(chain)), space: s.space.Claim("unpack")}
	digests := make([]digest.Digest, len(chain))
	for i, d := range chain {
		digests[i] = digest.Digest(d)
	}
	for _, id := range identity.ChainIDs(digests) {
		u.keys = append(u.keys, layout.SnapshotKey(id))
	}
	any := false
	err := s.db.View(ctx, func(tx *metadata.Tx) error {
		nodes, err := u.find(tx)
		any = len(nodes) > 0
		return err
	})
	if err != nil || !any {
		return u, err
	}
	return u, lease.Hold(ctx, u.find)
}

// find looks what exists; it may run more than once.
func (u *Unpack) find(tx *metadata.Tx) ([]layout.Node, error) {
	var nodes []layout.Node
	u.have = 0
	for i, key := range u.keys {
		u.layers[i] = place{}
		if u.have == i && tx.Snapshots().Has(key) {
			rec, err := tx.Snapshots().Get(key)
			if err != nil {
				return nil, err
			}
			u.have = i + 1
			u.layers[i] = place{id: rec.Layer, exists: true}
			nodes = append(nodes, layout.SnapshotNode(key))
			continue
		}
		for _, k := range []string{layout.DiffKey(u.chain[i]), layout.ChainKey(layout.ChainID(key))} {
			id, _, err := tx.LayerByKey(k)
			if errors.Is(err, errdefs.ErrNotFound) {
				continue
			}
			if err != nil {
				return nil, err
			}
			u.layers[i] = place{id: id, exists: true}
			nodes = append(nodes, layout.LayerNode(id))
			break
		}
	}
	return nodes, nil
}

// Missing tells for each layer whether it has to be unpacked.
func (u *Unpack) Missing() []bool {
	out := make([]bool, len(u.layers))
	for i, p := range u.layers {
		out[i] = !p.exists
	}
	return out
}

// Layer unpacks layer i of the chain from its uncompressed tar stream, which
// is read to its end and compared with the chain's DiffID. It may run for
// several layers at once, and again for the same one after an error.
//
// Errors: ErrFailedPrecondition, naming both DiffIDs; else as layer.Apply.
func (u *Unpack) Layer(ctx context.Context, i int, tar io.Reader) error {
	p, err := u.apply(ctx, i, tar)
	if err != nil {
		if p.tree != nil {
			p.tree.Close()
		}
		if p.staging != "" {
			u.snap.journal.Discard(p.staging)
		}
		u.space.Unwrite(p.bytes)
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.layers[i] = p
	return nil
}

func (u *Unpack) apply(ctx context.Context, i int, tar io.Reader) (p place, err error) {
	root := u.snap.root
	if p.id, p.staging, err = u.snap.journal.NewStaging(); err != nil {
		return p, err
	}
	rel := path.Join(p.staging, layout.TreeDir)
	if err := root.Mkdir(rel, treePerm); err != nil {
		return p, err
	}
	durable.At(layout.PointTreePartial)
	if p.tree, err = root.NewTree(rel, u.barrier); err != nil {
		return p, err
	}
	room := func(bytes int64) error {
		if err := u.space.Write(ctx, bytes); err != nil {
			return err
		}
		p.bytes += bytes
		return nil
	}
	if p.applied, err = layer.Apply(ctx, tar, p.tree, room); err != nil {
		return p, err
	}
	if p.applied.DiffID != u.chain[i] {
		return p, fmt.Errorf("layer %d unpacks to the DiffID %s, its image says %s: %w", i, p.applied.DiffID, u.chain[i], errdefs.ErrFailedPrecondition)
	}
	durable.At(layout.PointTreeWhole)
	if p.applied.Unresolved() {
		return p, nil // the parents have to be there first
	}
	return p, p.describe(ctx)
}

// describe walks the finished tree.
func (p *place) describe(ctx context.Context) (err error) {
	p.files, err = layer.Walk(ctx, p.tree.Path("."), layer.WalkOptions{Sums: p.applied.Sums()})
	return err
}

// Finish completes the trees in order, from the bottom, and adds what has to
// be published to in. It returns the snapshot of the whole chain, "" for an
// image without layers.
func (u *Unpack) Finish(ctx context.Context, in *layout.IntentRecord) (layout.SnapshotKey, error) {
	now := time.Now().UTC()
	twins := map[string]int{} // layer keys of this very image
	var top layout.SnapshotKey
	for i := range u.layers {
		p := &u.layers[i]
		if !p.exists {
			if p.applied == nil {
				return "", fmt.Errorf("layer %d (%s) was never unpacked: %w", i, u.chain[i], errdefs.ErrFailedPrecondition)
			}
			if err := u.finishLayer(ctx, i, now, in, twins); err != nil {
				return "", fmt.Errorf("layer %d (%s): %w", i, u.chain[i], err)
			}
		}
		if i >= u.have {
			size, inodes, err := u.usage(ctx, p)
			if err != nil {
				return "", err
			}
			in.Snapshots = append(in.Snapshots, layout.SnapshotMake{Key: u.keys[i], Record: layout.SnapshotRecord{
				Kind: layout.SnapshotCommitted, Parent: top, Layer: p.id, Created: now, Updated: now, Size: size, Inodes: inodes,
			}})
		}
		top = u.keys[i]
	}
	return top, nil
}

// finishLayer resolves, describes and records one new tree.
func (u *Unpack) finishLayer(ctx context.Context, i int, now time.Time, in *layout.IntentRecord, twins map[string]int) error {
	p := &u.layers[i]
	rec := layout.LayerRecord{DiffID: u.chain[i], Created: now}
	if p.files == nil {
		parents, err := u.parents(ctx, i)
		if err != nil {
			return err
		}
		if err := p.applied.Resolve(parents); err != nil {
			return err
		}
		if err := p.describe(ctx); err != nil {
			return err
		}
		rec.ChainID = layout.ChainID(u.keys[i])
	}
	if twin, ok := twins[rec.Key()]; ok {
		// The same layer twice in one image, as empty ones are.
		u.snap.journal.Discard(p.staging)
		p.tree.Close()
		*p = place{id: u.layers[twin].id, files: u.layers[twin].files, applied: p.applied}
		return nil
	}
	twins[rec.Key()] = i
	blob, at, err := u.snap.stageManifest(p.files, u.barrier)
	if err != nil {
		return err
	}
	p.manifest = at
	rec.Manifest = blob.Digest
	rec.Size, rec.Inodes = p.files.Usage()
	in.Blobs = append(in.Blobs, blob)
	in.Layers = append(in.Layers, layout.LayerMove{ID: p.id, From: p.staging, Record: rec})
	return nil
}

// parents returns the layers below layer i, the topmost first.
func (u *Unpack) parents(ctx context.Context, i int) ([]layer.Parent, error) {
	var out []layer.Parent
	for j := i - 1; j >= 0; j-- {
		p := &u.layers[j]
		if p.files != nil && p.tree != nil {
			out = append(out, layer.Parent{Manifest: p.files, Dir: p.tree.Path(".")})
			continue
		}
		below, err := u.snap.parentOf(ctx, p.id)
		if err != nil {
			return nil, err
		}
		out = append(out, below)
	}
	return out, nil
}

func (u *Unpack) usage(ctx context.Context, p *place) (size, inodes int64, err error) {
	if p.files != nil {
		size, inodes = p.files.Usage()
		return size, inodes, nil
	}
	err = u.snap.db.View(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Layers().Get(p.id)
		size, inodes = rec.Size, rec.Inodes
		return err
	})
	return size, inodes, err
}

// Abandon throws away what was unpacked and lets go of the rest. After a
// publication only the latter is left to do: the trees have other names then.
func (u *Unpack) Abandon() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.done {
		return
	}
	u.done = true
	defer u.space.Release()
	for _, p := range u.layers {
		if p.tree != nil {
			p.tree.Close()
		}
		for _, at := range []string{p.staging, p.manifest} {
			if at != "" {
				u.snap.journal.Discard(at)
			}
		}
	}
}
