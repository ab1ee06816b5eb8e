package journal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"time"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// ErrIntended is in the error of a publication whose intent is recorded, or may
// be: it is finished as soon as that is possible, by the store's next owner if
// not by this one, and until then the files that it names are the journal's.
var ErrIntended = errors.New("it is recorded, and will be finished")

// Publish makes in real: after nil its blobs, layers, snapshots, images and
// edges are durable, recorded and visible, all of them or, after an error
// without [ErrIntended], none.
//
// barrier holds every file of in that has not been made durable otherwise. An
// edge of in may lead to something that exists already, which the caller keeps
// alive by a lease; if it is gone all the same, the error is ErrNotFound.
//
// ctx ends the call before the intent is written, not after.
func (j *Journal) Publish(ctx context.Context, barrier *durable.Barrier, in layout.IntentRecord) error {
	if err := barrier.Wait(sources(in)...); err != nil {
		return fmt.Errorf("publish %s: %w", in.Purpose, err)
	}
	durable.At(layout.PointPublishDurable)
	if err := ctx.Err(); err != nil {
		return err
	}
	id := layout.IntentID(layout.NewID())
	in.Created = time.Now().UTC()
	if err := j.intend(ctx, id, in); err != nil {
		if j.root.Poisoned() != nil {
			err = fmt.Errorf("%w: %w", ErrIntended, err) // nobody knows
		}
		return fmt.Errorf("publish %s: %w", in.Purpose, err)
	}
	durable.At(layout.PointPublishIntended)
	if err := j.carryOut(id, in); err != nil {
		j.pend(id, in)
		return fmt.Errorf("publish %s: %w: %w", in.Purpose, ErrIntended, err)
	}
	durable.At(layout.PointPublishRecorded)
	return nil
}

// sources are the temporary names, for the barrier.
func sources(in layout.IntentRecord) []string {
	var out []string
	for _, m := range in.Blobs {
		out = append(out, m.From)
	}
	for _, m := range in.Layers {
		out = append(out, m.From)
	}
	return out
}

// intend writes the intent, once no claimed sweep stands in its way.
func (j *Journal) intend(ctx context.Context, id layout.IntentID, in layout.IntentRecord) error {
	for {
		moved := j.nextMove()
		var busy bool
		var met fence
		err := j.db.Update(ctx, func(tx *metadata.Tx) error {
			var err error
			if busy, met, err = j.takeBack(tx, in.Blobs); err != nil || busy {
				return err
			}
			if err := hold(tx, id, in); err != nil {
				return err
			}
			return tx.Intents().Put(id, in)
		})
		switch {
		case err != nil || busy:
		case met == takenBack:
			durable.At(layout.PointFenceTaken)
		case met == trashedBefore:
			durable.At(layout.PointFenceTrashed)
		}
		if err != nil || !busy {
			return err
		}
		j.Kick()
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fence is how a publication met the removal of what has its name.
type fence int

const (
	unmet         fence = iota
	takenBack           // the removal had not begun, and is called off
	trashedBefore       // what was removed is in the trash
)

// takeBack drops the unclaimed sweeps of blobs that are published again. Of a
// claimed one whose file is in the trash by now, the sweep is of that from here
// on, and not of what gets its name; it tells whether one has to be waited for.
func (j *Journal) takeBack(tx *metadata.Tx, blobs []layout.BlobMove) (busy bool, met fence, err error) {
	var drop []string
	trashed := map[string]layout.SweepRecord{}
	for _, m := range blobs {
		n := layout.BlobNode(m.Digest)
		err = tx.Sweeps().Each(layout.SweepPrefix(n), func(id string, s layout.SweepRecord) error {
			switch {
			case s.Node != n:
			case s.Claimed && j.inTrash(id):
				s.Node, s.Path = layout.TrashNode(id), layout.TrashPath(id)
				trashed[id] = s
			case s.Claimed:
				busy = true
			default:
				drop = append(drop, id)
			}
			return nil
		})
		if err != nil || busy {
			return busy, met, err
		}
	}
	for _, id := range drop {
		met = takenBack
		if err := tx.Sweeps().Delete(id); err != nil {
			return false, met, err
		}
	}
	for id, s := range trashed {
		met = trashedBefore
		if err := tx.Sweeps().Put(id, s); err != nil {
			return false, met, err
		}
	}
	return false, met, nil
}

// hold keeps what the intent needs and what it takes over until it is carried
// out, whatever becomes of the leases of who wrote it. It refuses an intent that
// refers to what is neither there nor part of it: its lease was lost.
func hold(tx *metadata.Tx, id layout.IntentID, in layout.IntentRecord) error {
	nodes := needs(in)
	for _, m := range in.Layers {
		if n, ok := m.Taken(); ok {
			nodes = append(nodes, n)
		}
	}
	for _, n := range nodes {
		if !tx.Exists(n) {
			return fmt.Errorf("%s is needed and not in the store: %w", n, errdefs.ErrNotFound)
		}
		if err := tx.Link(layout.Edge{Parent: layout.IntentNode(id), Rel: layout.RelHolds, Child: n}); err != nil {
			return err
		}
	}
	return nil
}

// needs are what an intent refers to and does not bring.
func needs(in layout.IntentRecord) (need []layout.Node) {
	for _, e := range in.Edges {
		need = append(need, e.Child)
	}
	for _, m := range in.Snapshots {
		if m.Record.Parent != "" {
			need = append(need, layout.SnapshotNode(m.Record.Parent))
		}
		need = append(need, layout.LayerNode(m.Record.Layer))
	}
	for _, m := range in.Images {
		need = append(need, layout.BlobNode(layout.BlobDigest(m.Record.Target.Digest)))
	}
	for _, m := range in.Cache {
		for _, s := range m.Record.Snapshots {
			need = append(need, layout.SnapshotNode(s))
		}
	}
	own := map[layout.Node]bool{}
	for _, m := range in.Blobs {
		own[layout.BlobNode(m.Digest)] = true
	}
	for _, m := range in.Layers {
		own[layout.LayerNode(m.ID)] = true
	}
	for _, m := range in.Snapshots {
		own[layout.SnapshotNode(m.Key)] = true
	}
	return slices.DeleteFunc(need, func(n layout.Node) bool { return own[n] })
}

// carryOut does what the recorded intent says. Every step may have been done
// before.
func (j *Journal) carryOut(id layout.IntentID, in layout.IntentRecord) error {
	var changed []string
	for _, m := range in.Blobs {
		if err := j.moveBlob(m); err != nil {
			return err
		}
		changed = append(changed, path.Dir(m.From), path.Dir(layout.BlobPath(m.Digest)))
		durable.At(layout.PointPublishBlob)
	}
	for _, m := range in.Layers {
		if err := j.moveOnce(m.From, layout.LayerPath(m.ID)); err != nil {
			return err
		}
		changed = append(changed, path.Dir(m.From), layout.LayersDir)
		durable.At(layout.PointPublishLayer)
	}
	durable.At(layout.PointPublishRenamed)
	if err := j.root.SyncNames(j.existing(unique(changed))...); err != nil {
		return err
	}
	durable.At(layout.PointPublishSynced)
	// From here on only the database is left; a caller that gives up now
	// must not leave the intent open behind it.
	err := j.db.Update(context.Background(), func(tx *metadata.Tx) error { return tx.Apply(id, in) })
	if err != nil {
		return err
	}
	j.clean(in)
	j.Kick()
	return nil
}

// moveBlob gives a blob its name. One that stands there already is the same
// bytes, by its digest, unless nothing vouches for it.
func (j *Journal) moveBlob(m layout.BlobMove) error {
	target := layout.BlobPath(m.Digest)
	err := j.moveOnce(m.From, target)
	if !errors.Is(err, errdefs.ErrAlreadyExists) {
		return err
	}
	// Published by somebody else meanwhile, or swept back: either way it
	// was verified before it got the name. A file of another size is
	// damage, and the verified one takes its place.
	fi, serr := os.Lstat(j.root.Path(target))
	if serr == nil && fi.Mode().IsRegular() && fi.Size() == m.Record.Size {
		return j.root.Remove(m.From)
	}
	if err := j.root.Remove(target); err != nil {
		return err
	}
	return j.moveOnce(m.From, target)
}

// errNowhere says that what an intent names has gone.
var errNowhere = fmt.Errorf("neither is there: %w", errdefs.ErrDataLoss)

// moveOnce renames from to to, unless that was done before.
func (j *Journal) moveOnce(from, to string) error {
	err := j.root.Rename(from, to)
	if !errors.Is(err, errdefs.ErrNotFound) {
		return err
	}
	if _, serr := os.Lstat(j.root.Path(from)); serr == nil {
		return err // what is missing is the folder to move it to
	}
	if _, serr := os.Lstat(j.root.Path(to)); serr != nil {
		return fmt.Errorf("%s was to become %s: %w", from, to, errNowhere)
	}
	return nil
}

// existing leaves out folders that are gone: an ingest's, when an intent is
// carried out again.
func (j *Journal) existing(dirs []string) []string {
	return slices.DeleteFunc(dirs, func(d string) bool {
		_, err := os.Lstat(j.root.Path(d))
		return errors.Is(err, fs.ErrNotExist)
	})
}

// clean removes the folders that the blobs were renamed out of. They hold
// nothing that anybody needs; what is left of them is an ingest that can be
// resumed from nothing.
func (j *Journal) clean(in layout.IntentRecord) {
	for _, m := range in.Blobs {
		dir := path.Dir(m.From)
		switch path.Dir(dir) {
		case layout.IngestDir, j.stagingDir():
			_ = j.root.RemoveAll(dir)
		}
	}
}

func parent(rel string) string { return path.Dir(rel) }

// unique sorts and removes repetitions.
func unique(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}
