package repair

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// recordRepairs are the repairs of what is wrong with a record, a name or a
// mode, by the invariant. What is neither here nor healed by a step of its own
// is healed by opening the store, or by nobody: a test compares the three with
// the law.
var recordRepairs = map[string]func(context.Context, *work, fsck.Finding, *Outcome) error{
	"M4": rewriteLog,
	"B4": unused(func(name string) layout.Node {
		return layout.BlobNode(layout.BlobDigest(string(layout.Algorithm) + ":" + name))
	}),
	"B5": func(_ context.Context, w *work, f fsck.Finding, _ *Outcome) error {
		return w.Root.SetMode(f.Path, blobPerm)
	},
	"L2": unused(func(name string) layout.Node { return layout.LayerNode(layout.LayerID(name)) }),
	"L5": fixLayerKey,
	"L6": fixUsage,
	"S3": func(ctx context.Context, w *work, f fsck.Finding, _ *Outcome) error {
		key, err := quoted(f.Object)
		if err != nil {
			return err
		}
		return w.Snaps.Remake(ctx, layout.SnapshotKey(key))
	},
	"E1": fixEdge,
	"E2": restoreEnds,
	"E3": fixEdge,
	"E4": func(ctx context.Context, w *work, f fsck.Finding, _ *Outcome) error {
		n, err := quoted(f.Object)
		if err != nil {
			return err
		}
		defer w.Journal.Kick()
		return w.DB.Update(ctx, func(tx *metadata.Tx) error { return tx.Collect(layout.Node(n)) })
	},
	"E5": recount,
	"A1": recount,
	"T2": func(ctx context.Context, w *work, f fsck.Finding, _ *Outcome) error {
		_, id, _ := strings.Cut(f.Object, " ")
		return w.DB.Update(ctx, func(tx *metadata.Tx) error { return tx.Sweeps().Delete(id) })
	},
	"N1": func(_ context.Context, w *work, f fsck.Finding, _ *Outcome) error {
		_, id, _ := strings.Cut(f.Object, " ")
		return w.Root.RemoveAll(layout.IngestPath(layout.IngestID(id)))
	},
	"K1": func(ctx context.Context, w *work, f fsck.Finding, _ *Outcome) error {
		key, err := quoted(f.Object)
		if err != nil || w.restored[layout.CacheNode(key)] != "" { // with its place
			return err
		}
		defer w.Journal.Kick()
		return w.DB.Update(ctx, func(tx *metadata.Tx) error { return tx.DropCache(key) })
	},
}

// healedByOpening are the invariants that hold again when the store is opened:
// recovery, or a database that is made anew.
var healedByOpening = []string{"M1", "M2", "M3", "M5", "T1", "G1", "J1", "R2"}

// leftToUsers are those that no repair is for: nothing is wrong, or only a pull,
// or a person, can help. A record that they miss is made again for E2, which
// finds it too.
var leftToUsers = []string{"S1", "S2", "S4", "I1", "I2", "I3", "G2", "C1", "C2", "R1"}

// blobPerm is the mode of a blob.
const blobPerm = 0o444

// recount makes the uses and accounts anew.
func recount(ctx context.Context, w *work, _ fsck.Finding, _ *Outcome) error {
	return w.DB.Update(ctx, (*metadata.Tx).Recount)
}

// rewriteLog writes the log from the database, and keeps what it was: it may be
// the database that is wrong.
func rewriteLog(ctx context.Context, w *work, f fsck.Finding, out *Outcome) error {
	p, err := w.newPlace(f.Object, []fsck.Finding{f}, nil)
	if err != nil {
		return err
	}
	if err = p.keep(layout.LogFile); err == nil {
		err = w.DB.RewriteLog(ctx)
	}
	dir, cerr := p.close()
	out.Quarantine = dir
	return errors.Join(err, cerr)
}

// unused moves what nothing names to the trash, unless something does by now.
func unused(nodeOf func(name string) layout.Node) func(context.Context, *work, fsck.Finding, *Outcome) error {
	return func(ctx context.Context, w *work, f fsck.Finding, _ *Outcome) error {
		defer w.Journal.Kick()
		return w.DB.Update(ctx, func(tx *metadata.Tx) error {
			n := nodeOf(path.Base(f.Path))
			swept, err := tx.Unused(n, f.Path)
			if err == nil && !swept && tx.Referenced(n) && !tx.Exists(n) {
				err = fmt.Errorf("%s is referred to, and not recorded: %w", n, errdefs.ErrFailedPrecondition)
			}
			return err
		})
	}
}

// fixLayerKey is for a key that leads astray, or a layer that lacks its own.
func fixLayerKey(ctx context.Context, w *work, f fsck.Finding, _ *Outcome) error {
	return w.DB.Update(ctx, func(tx *metadata.Tx) error {
		if n, ok := node(f); ok {
			_, id := n.Split()
			rec, err := tx.Layers().Get(layout.LayerID(id))
			if err != nil {
				return err
			}
			return tx.PutLayer(layout.LayerID(id), rec)
		}
		key, err := quoted(f.Object)
		if err != nil {
			return err
		}
		return tx.FixLayerKey(key)
	})
}

// fixUsage counts a layer again by its file manifest.
func fixUsage(ctx context.Context, w *work, f fsck.Finding, _ *Outcome) error {
	n, _ := node(f)
	_, id := n.Split()
	t := &treeRepair{work: w, id: layout.LayerID(id), rec: w.known.layers[layout.LayerID(id)]}
	files, err := t.manifest(ctx)
	if err != nil {
		return err
	}
	return w.DB.Update(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Layers().Get(t.id)
		if err != nil {
			return err
		}
		rec.Size, rec.Inodes = files.Usage()
		return tx.PutLayer(t.id, rec)
	})
}

func fixEdge(ctx context.Context, w *work, f fsck.Finding, _ *Outcome) error {
	e, err := edgeOf(f.Object)
	if err != nil {
		return err
	}
	needless := e.Rel == layout.RelContent && w.namesOthers(ctx, e)
	defer w.Journal.Kick()
	return w.DB.Update(ctx, func(tx *metadata.Tx) error {
		if needless {
			return tx.Unlink(e)
		}
		return tx.FixEdge(e)
	})
}

// namesOthers tells whether an edge begins at a manifest or an index that can
// be read and does not name its child.
func (w *work) namesOthers(ctx context.Context, e layout.Edge) bool {
	_, parent := e.Parent.Split()
	_, child := e.Child.Split()
	var doc document
	if !w.readJSON(ctx, layout.BlobDigest(parent), &doc) {
		return false
	}
	if doc.Config != nil {
		doc.Layers = append(doc.Layers, *doc.Config)
	}
	return !slices.ContainsFunc(append(doc.Layers, doc.Manifests...), func(d ocispec.Descriptor) bool { return d.Digest.String() == child })
}

// edgeOf reads how findings name an edge: edge "parent" -rel-> "child".
func edgeOf(object string) (e layout.Edge, err error) {
	var rel string
	var parent, child string
	if _, err := fmt.Sscanf(object, "edge %q %s %q", &parent, &rel, &child); err != nil {
		return e, fmt.Errorf("%s: %w: %w", object, err, errdefs.ErrInvalidArgument)
	}
	rel = strings.TrimSuffix(strings.TrimPrefix(rel, "-"), "->")
	return layout.Edge{Parent: layout.Node(parent), Rel: rel, Child: layout.Node(child)}, nil
}

// quoted returns what an object's name has in quotes.
func quoted(object string) (string, error) {
	_, rest, _ := strings.Cut(object, `"`)
	s, err := strconv.Unquote(`"` + rest)
	if err != nil {
		return "", fmt.Errorf("%s: %w: %w", object, err, errdefs.ErrInvalidArgument)
	}
	return s, nil
}
