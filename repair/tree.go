package repair

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layer"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// treeStep makes a layer's tree equal its file manifest.
func (w *work) treeStep(_ context.Context, id layout.LayerID) *Step {
	rec, ok := w.known.layers[id]
	if !ok {
		return nil
	}
	t := &treeRepair{work: w, id: id, rec: rec}
	step := &Step{Object: "layer " + string(id), Does: "replace what is not as its file manifest has it", order: treesNext}
	t.sources = w.sourcesOf(id, rec)
	for _, s := range t.sources {
		step.From = append(step.From, s.String())
		step.Fetch += s.fetch()
	}
	step.run = func(ctx context.Context, out *Outcome) error {
		t.step, t.out = step, out
		return t.run(ctx)
	}
	return step
}

// treeRepair is the repair of one layer.
type treeRepair struct {
	*work
	id      layout.LayerID
	rec     layout.LayerRecord
	sources []source
	step    *Step
	out     *Outcome

	files *layer.Manifest
	place *place
	good  *durable.Tree // the place, for what is made there
}

// rounds bounds how often a tree is compared and mended: a directory that took
// the place of a file has to be filled.
const rounds = 4

func (t *treeRepair) tree() string { return path.Join(layout.LayerPath(t.id), layout.TreeDir) }

func (t *treeRepair) run(ctx context.Context) (err error) {
	if t.files, err = t.manifest(ctx); err != nil {
		return errors.Join(err, t.mark(ctx, false))
	}
	if t.place, err = t.newPlace(t.step.Object, t.step.Findings, t.known.imagesOn(t.rec)); err != nil {
		return err
	}
	whole, err := t.mendAll(ctx)
	bad := t.place.bad
	dir, cerr := t.place.close()
	t.out.Quarantine = dir
	if err := errors.Join(err, cerr); err != nil {
		return err
	}
	if bad > 0 {
		t.out.Containers = t.letGo(ctx, t.tree(), dir)
	}
	t.out.Healed = whole
	return t.mark(ctx, whole)
}

// manifest reads the layer's file manifest, which its digest vouches for.
func (t *treeRepair) manifest(ctx context.Context) (*layer.Manifest, error) {
	r, err := t.Blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: t.rec.Manifest.Digest()})
	if err != nil {
		return nil, fmt.Errorf("file manifest: %w", err)
	}
	defer r.Close()
	sum := layout.Algorithm.Digester()
	m, err := layer.Decode(io.TeeReader(io.NewSectionReader(r, 0, r.Size()), sum.Hash()))
	if err == nil && sum.Digest() != t.rec.Manifest.Digest() {
		err = &errdefs.Corrupt{Invariant: "B3", Object: "blob " + string(t.rec.Manifest), Detail: "its bytes have the digest " + sum.Digest().String()}
	}
	return m, err
}

// mendAll compares and mends until nothing is left to do, and tells whether
// that is so.
func (t *treeRepair) mendAll(ctx context.Context) (whole bool, err error) {
	if err := t.makeRoot(); err != nil {
		return false, err
	}
	suspects, all := map[string]bool{}, false
	for _, f := range t.step.Findings {
		suspects[f.Path] = true
		all = all || f.Path == "" // nobody has looked at its files
	}
	suspect := func(name string) bool { return all || suspects[name] }
	lacking := false
	for range rounds {
		changes, extra, err := compare(ctx, t.Root.Path(t.tree()), t.files, suspect)
		if err != nil {
			return false, err
		}
		if lacking || len(changes) == 0 && len(extra) == 0 {
			return len(changes) == 0 && len(extra) == 0, nil
		}
		if lacking, err = t.mend(ctx, changes, extra); err != nil {
			return false, err
		}
	}
	return false, nil
}

// makeRoot makes the tree's own directory, if something else or nothing stands
// there.
func (t *treeRepair) makeRoot() error {
	for _, rel := range []string{layout.LayerPath(t.id), t.tree()} {
		fi, err := os.Lstat(t.Root.Path(rel))
		if err == nil && fi.IsDir() {
			continue
		}
		if err == nil {
			if err := t.place.take(rel); err != nil {
				return err
			}
		}
		if err := t.Root.Mkdir(rel, 0o711); err != nil {
			return err
		}
		if err := t.Root.SyncNames(path.Dir(rel), rel); err != nil {
			return err
		}
	}
	return nil
}

// mend makes what is needed in the place and gives it its names. lacking tells
// that something could not be made.
func (t *treeRepair) mend(ctx context.Context, changes []*change, extra []string) (lacking bool, err error) {
	barrier := t.Root.NewBarrier()
	defer barrier.Abandon()
	if t.good, err = t.Root.NewTree(t.place.rel, barrier); err != nil {
		return false, err
	}
	defer t.good.Close()
	m, err := t.Root.NewMender(t.tree(), t.place.rel)
	if err != nil {
		return false, err
	}
	defer m.Close()
	for _, name := range extra {
		if err := m.Take(name, t.place.name(path.Join(t.tree(), name))); err != nil {
			return false, err
		}
		t.place.bad++
	}
	made, err := t.make(ctx, changes)
	if err != nil {
		return false, err
	}
	// What was made is durable before it gets a name that counts.
	if err := errors.Join(t.place.save(), barrier.Wait(t.place.rel)); err != nil {
		return false, err
	}
	durable.At(layout.PointRepairMade)
	for _, c := range changes {
		if at, ok := made[c]; ok || c.good != "" {
			err = t.give(m, c, at)
		} else {
			lacking = true
		}
		if err != nil {
			return false, err
		}
	}
	durable.At(layout.PointRepairGiven)
	return lacking, errors.Join(t.setTimes(m), m.Sync())
}

// make makes the files that have to be made and returns their names in the
// place.
func (t *treeRepair) make(ctx context.Context, changes []*change) (map[*change]string, error) {
	made := map[*change]string{}
	need := needs{}
	for _, c := range changes {
		if c.good != "" || len(c.names) == 0 {
			continue
		}
		if c.needsContents() {
			need.add(c)
			continue
		}
		at, err := t.makeWithout(c.want)
		if err != nil {
			return nil, err
		}
		made[c] = at
	}
	return made, t.find(ctx, need, made)
}

// makeWithout makes an entry that the manifest describes completely.
func (t *treeRepair) makeWithout(e *layer.Entry) (at string, err error) {
	at = t.place.name(path.Join(t.tree(), e.Names[0]))
	switch kind := e.Mode & unix.S_IFMT; kind {
	case unix.S_IFREG:
		_, _, err = t.good.File(at, attrOf(e), strings.NewReader(""), false, make([]byte, 1))
	case unix.S_IFDIR:
		err = t.good.Mkdir(at, attrOf(e))
	case unix.S_IFLNK:
		err = t.good.Symlink(at, e.Target, attrOf(e))
	default:
		err = t.good.Node(at, kind, e.Rdev, attrOf(e))
	}
	return at, err
}

func attrOf(e *layer.Entry) durable.Attr {
	return durable.Attr{Mode: e.Mode & 0o7777, UID: int(e.UID), GID: int(e.GID), MTime: e.MTime, Xattrs: e.Xattrs}
}

// give lets names of an entry stand for the good file: the one that was made
// at, or the one that has a good name.
func (t *treeRepair) give(m *durable.Mender, c *change, at string) error {
	good := c.good
	for _, name := range c.names {
		from := at
		if good != "" {
			from = t.place.name(path.Join(t.tree(), name))
			if err := m.Link(good, from); err != nil {
				return err
			}
		}
		had, err := m.Put(from, name)
		if err != nil {
			return err
		}
		if had {
			t.place.bad++
		}
		good = name
	}
	if !c.dress {
		return nil
	}
	return m.Dress(c.good, attrOf(c.want), layer.OverlaysOwn)
}

// setTimes sets the times of directories in which names were exchanged.
func (t *treeRepair) setTimes(m *durable.Mender) error {
	dirs := m.Changed()
	slices.Sort(dirs)
	for _, dir := range slices.Backward(dirs) {
		if e, ok := t.files.Lookup(dir); ok && e.Mode&unix.S_IFMT == unix.S_IFDIR {
			if err := m.SetTime(dir, e.MTime); err != nil {
				return err
			}
		}
	}
	return nil
}

// mark notes in the layer's record whether it can be used, and names the
// images that cannot.
func (t *treeRepair) mark(ctx context.Context, whole bool) error {
	if !whole {
		t.out.Breaks = t.known.imagesOn(t.rec)
	}
	return t.DB.Update(context.WithoutCancel(ctx), func(tx *metadata.Tx) error {
		rec, err := tx.Layers().Get(t.id)
		if err != nil || rec.Damaged.IsZero() == whole {
			return err
		}
		rec.Damaged = time.Time{}
		if !whole {
			rec.Damaged = time.Now().UTC()
		}
		return tx.PutLayer(t.id, rec)
	})
}
