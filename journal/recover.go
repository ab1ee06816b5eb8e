package journal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// Recovery says what [Open] found and did.
type Recovery struct {
	Finished  []string // purposes of intents that were carried out
	GivenUp   []string // and of those that cannot be, with the reason
	Discarded int      // trees that nobody had finished
	Emptied   int      // entries of the trash that were deleted
	Leases    int      // leases of operations that died
	Ingests   int      // unfinished blobs that nobody can go on with
	// Adopted are directories in active and containers that no record names
	// and that hold something, or that a rebuilt database did not know. They
	// stay.
	Adopted []string
	// Stranded are recorded layers whose tree stands in staging (G2). They
	// stay; fsck reports them.
	Stranded []string
}

// recover brings the store into a state in which no operation is under way.
// Nobody else has it open, so whatever looks unfinished is.
func (j *Journal) recover(ctx context.Context) (Recovery, error) {
	var found Recovery
	for _, step := range []func(context.Context, *Recovery) error{
		j.finishIntents, j.emptyStaging, j.checkActive, j.checkContainers, j.dropIngests, j.dropCacheMounts, j.emptyTrash, j.endLeases,
	} {
		if err := step(ctx, &found); err != nil {
			return found, err
		}
	}
	return found, nil
}

func (j *Journal) finishIntents(ctx context.Context, found *Recovery) error {
	open := map[layout.IntentID]layout.IntentRecord{}
	err := j.db.View(ctx, func(tx *metadata.Tx) error {
		return tx.Intents().Each("", func(id layout.IntentID, in layout.IntentRecord) error {
			open[id] = in
			return nil
		})
	})
	if err != nil {
		return err
	}
	for id, in := range open {
		err := j.carryOut(id, in)
		if errors.Is(err, errNowhere) {
			found.GivenUp = append(found.GivenUp, fmt.Sprintf("%s: %v", in.Purpose, err))
			err = j.giveUp(ctx, id, in)
		} else if err == nil {
			found.Finished = append(found.Finished, in.Purpose)
		}
		if err != nil {
			return fmt.Errorf("intent %s (%s): %w", id, in.Purpose, err)
		}
	}
	return nil
}

// giveUp drops an intent that cannot be carried out, because what it names has
// gone. Nobody was told that it was done. What of it has its place already, and
// no record, is swept; what is in staging goes with the rest of that.
func (j *Journal) giveUp(ctx context.Context, id layout.IntentID, in layout.IntentRecord) error {
	nodes := map[layout.Node]layout.Usage{}
	for _, m := range in.Blobs {
		nodes[layout.BlobNode(m.Digest)] = layout.BlobUsage(m.Record)
	}
	for _, m := range in.Layers {
		nodes[layout.LayerNode(m.ID)] = layout.LayerUsage(m.Record)
	}
	return j.db.Update(ctx, func(tx *metadata.Tx) error {
		for n, usage := range nodes {
			at := layout.NodePath(n)
			if at == "" || tx.Exists(n) {
				continue
			}
			if err := tx.Sweep(n, at, usage); err != nil {
				return err
			}
		}
		return tx.Drop(layout.IntentNode(id))
	})
}

// emptyStaging moves what nobody finished to the trash. A tree that a record
// names and that is missing from layers stays where it is: the order of writes
// makes that impossible, so whatever brought it about may be wrong about the
// rest too.
func (j *Journal) emptyStaging(ctx context.Context, found *Recovery) error {
	boots, err := os.ReadDir(j.root.Path(layout.StagingDir))
	if err != nil {
		return missing(err)
	}
	for _, boot := range boots {
		dir := path.Join(layout.StagingDir, boot.Name())
		if !boot.IsDir() {
			if err := j.root.Rename(dir, layout.TrashPath(layout.NewID())); err != nil {
				return err
			}
			found.Discarded++
			continue
		}
		trees, err := os.ReadDir(j.root.Path(dir))
		if err != nil {
			return missing(err)
		}
		stranded := false
		for _, tree := range trees {
			rel := path.Join(dir, tree.Name())
			if j.isStranded(ctx, layout.LayerID(tree.Name())) {
				found.Stranded = append(found.Stranded, rel)
				stranded = true
				continue
			}
			if err := j.root.Rename(rel, layout.TrashPath(layout.NewID())); err != nil {
				return err
			}
			found.Discarded++
		}
		if !stranded && boot.Name() != j.boot {
			if err := j.root.Remove(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

func (j *Journal) isStranded(ctx context.Context, id layout.LayerID) bool {
	recorded := false
	_ = j.db.View(ctx, func(tx *metadata.Tx) error {
		recorded = tx.Layers().Has(id)
		return nil
	})
	if !recorded {
		return false
	}
	_, err := os.Lstat(j.root.Path(layout.LayerPath(id)))
	return errors.Is(err, fs.ErrNotExist)
}

// checkActive removes writable layers that were made and never recorded, if
// nothing was written into them. Of those that a rebuilt database did not know
// nobody can tell whether they were recorded: they stay.
func (j *Journal) checkActive(ctx context.Context, found *Recovery) error {
	dirs, err := os.ReadDir(j.root.Path(layout.ActiveDir))
	if err != nil || len(dirs) == 0 {
		return missing(err)
	}
	var named map[string]bool
	var rebuilt layout.RebuiltRecord
	err = j.db.View(ctx, func(tx *metadata.Tx) error {
		if named, err = sweptPaths(tx); err != nil {
			return err
		}
		if rebuilt, err = tx.Rebuilt(); err != nil {
			return err
		}
		for _, d := range dirs {
			id := layout.LayerID(d.Name())
			if tx.Referenced(layout.ActiveNode(id)) {
				named[layout.ActivePath(id)] = true
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, d := range dirs {
		rel := layout.ActivePath(layout.LayerID(d.Name()))
		if named[rel] {
			continue
		}
		if slices.Contains(rebuilt.Kept, rel) || !isEmptyTree(j.root.Path(path.Join(rel, layout.TreeDir))) {
			found.Adopted = append(found.Adopted, rel)
			continue
		}
		if err := j.root.Rename(rel, layout.TrashPath(layout.NewID())); err != nil {
			return err
		}
		found.Discarded++
	}
	return nil
}

// sweptPaths are where what is to be deleted stands.
func sweptPaths(tx *metadata.Tx) (map[string]bool, error) {
	paths := map[string]bool{}
	err := tx.Sweeps().Each("", func(_ string, s layout.SweepRecord) error {
		paths[s.Path] = true
		return nil
	})
	return paths, err
}

func isEmptyTree(dir string) bool {
	entries, err := os.ReadDir(dir)
	return errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0
}

// checkContainers finds the directories of containers that no record names.
func (j *Journal) checkContainers(ctx context.Context, found *Recovery) error {
	dirs, err := os.ReadDir(j.root.Path(layout.ContainersDir))
	if err != nil || len(dirs) == 0 {
		return missing(err)
	}
	return j.db.View(ctx, func(tx *metadata.Tx) error {
		swept, err := sweptPaths(tx)
		for _, d := range dirs {
			id := layout.ContainerID(d.Name())
			if rel := layout.ContainerPath(id); !tx.Containers().Has(id) && !tx.Referenced(layout.ContainerNode(id)) && !swept[rel] {
				found.Adopted = append(found.Adopted, rel)
			}
		}
		return err
	})
}

// dropIngests removes the unfinished blobs that nobody can go on with, and
// those of a blob that came another way.
func (j *Journal) dropIngests(ctx context.Context, found *Recovery) error {
	ingests, err := os.ReadDir(j.root.Path(layout.IngestDir))
	if err != nil {
		return missing(err)
	}
	for _, e := range ingests {
		rel := layout.IngestPath(layout.IngestID(e.Name()))
		resumable, err := j.isResumable(ctx, rel)
		if err != nil {
			return fmt.Errorf("ingest %s: %w: %w", e.Name(), err, errdefs.ErrUnavailable)
		}
		if resumable {
			continue
		}
		if err := j.root.RemoveAll(rel); err != nil {
			return err
		}
		found.Ingests++
	}
	return nil
}

// wanted tells whether a blob, if it is known which, is not in the store.
func (j *Journal) wanted(ctx context.Context, blob layout.BlobDigest) (wanted bool, err error) {
	err = j.db.View(ctx, func(tx *metadata.Tx) error {
		wanted = blob == "" || !tx.Blobs().Has(blob)
		return nil
	})
	return wanted, err
}

// dropCacheMounts removes those that were being filled with what they begin
// with, and those whose removal was recorded: the sweeper would come too late,
// when a build has begun to use the name.
func (j *Journal) dropCacheMounts(ctx context.Context, found *Recovery) error {
	rows := map[string]layout.SweepRecord{}
	err := j.db.View(ctx, func(tx *metadata.Tx) error {
		return tx.Sweeps().Each("", func(id string, s layout.SweepRecord) error {
			if kind, _ := s.Node.Split(); kind == layout.KindMount && s.Path == layout.NodePath(s.Node) {
				rows[id] = s
			}
			return nil
		})
	})
	if err == nil && len(rows) > 0 {
		err = j.toTrash(rows)
	}
	if err != nil {
		return err
	}
	mounts, err := os.ReadDir(j.root.Path(layout.CacheMountDir))
	if err != nil {
		return missing(err)
	}
	for _, m := range mounts {
		if !strings.HasSuffix(m.Name(), layout.CacheMountBegun) {
			continue
		}
		if err := j.root.Rename(layout.CacheMountPath(m.Name()), layout.TrashPath(layout.NewID())); err != nil {
			return err
		}
		found.Discarded++
	}
	return nil
}

// isResumable tells whether an ingest has data and a description, which may
// have been lost together, and may be gone on with by another process. A fifo
// or a link in the place of either is not opened.
func (j *Journal) isResumable(ctx context.Context, rel string) (bool, error) {
	for _, name := range []string{layout.IngestData, layout.IngestInfo} {
		fi, err := os.Lstat(j.root.Path(path.Join(rel, name)))
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), err == nil && !fi.Mode().IsRegular():
			return false, nil
		case err != nil:
			return false, err
		}
	}
	data, err := os.ReadFile(j.root.Path(path.Join(rel, layout.IngestInfo)))
	var info layout.IngestRecord
	if err != nil || json.Unmarshal(data, &info) != nil || info.Private {
		return false, err
	}
	return j.wanted(ctx, info.Expected)
}

// emptyTrash deletes what has no row. What has one is the sweeper's.
func (j *Journal) emptyTrash(ctx context.Context, found *Recovery) error {
	entries, err := os.ReadDir(j.root.Path(layout.TrashDir))
	if err != nil {
		return missing(err)
	}
	var orphans []string
	err = j.db.View(ctx, func(tx *metadata.Tx) error {
		for _, e := range entries {
			if !tx.Sweeps().Has(e.Name()) {
				orphans = append(orphans, e.Name())
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, name := range orphans {
		if err := j.root.RemoveAll(layout.TrashPath(name)); err != nil {
			return err
		}
		found.Emptied++
	}
	return nil
}

// endLeases drops the leases of processes that are gone, and those whose time
// is up.
func (j *Journal) endLeases(ctx context.Context, found *Recovery) (err error) {
	now := time.Now()
	found.Leases, err = j.db.EndLeases(ctx, func(l layout.LeaseRecord) bool { return l.Expires.IsZero() || now.After(l.Expires) })
	return err
}

// missing makes a directory that is not there the same as an empty one: a
// store whose creation was cut short.
func missing(err error) error {
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
}
