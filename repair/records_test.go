package repair_test

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/durable"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// mishaps break an invariant in an open store: of the file system, and of the
// records as a bug of varve's own would. What damages the database's file is
// not among them: it is made anew.
var mishaps = map[string]func(t *testing.T, h *host, tx *metadata.Tx) error{
	"B4": func(t *testing.T, h *host, _ *metadata.Tx) error {
		return os.WriteFile(h.blob(digest.FromString("nobody's").String()), []byte("nobody's"), 0o444)
	},
	"B5": func(t *testing.T, h *host, _ *metadata.Tx) error {
		_, manifest := stacked(t)
		return os.Chmod(h.blob(manifest), 0o644)
	},
	"L2": func(_ *testing.T, h *host, _ *metadata.Tx) error {
		return os.MkdirAll(filepath.Join(h.root, layout.LayerPath("nobodys"), layout.TreeDir), 0o711)
	},
	"L5": func(_ *testing.T, h *host, tx *metadata.Tx) error {
		id, rec := anyLayer(tx)
		diff := rec.DiffID
		rec.DiffID = layout.DiffID(digest.FromString("another"))
		if rec.ChainID != "" {
			rec.ChainID = layout.ChainID(rec.DiffID)
		}
		if err := tx.PutLayer(id, rec); err != nil {
			return err
		}
		rec.DiffID, rec.ChainID = diff, ""
		return tx.Layers().Put(id, rec)
	},
	"L6": func(_ *testing.T, h *host, tx *metadata.Tx) error {
		id, rec := anyLayer(tx)
		rec.Size++
		return tx.Layers().Put(id, rec)
	},
	"S3": func(_ *testing.T, h *host, tx *metadata.Tx) error {
		trees, err := filepath.Glob(filepath.Join(h.root, layout.ActiveDir, "*", layout.TreeDir))
		if err != nil {
			return err
		}
		return os.RemoveAll(trees[0])
	},
	"E2": func(_ *testing.T, h *host, tx *metadata.Tx) error {
		id, _ := anyLayer(tx)
		return tx.Link(layout.Edge{Parent: layout.ImageNode("nobody's"), Rel: layout.RelHolds, Child: layout.LayerNode(id)})
	},
	"E3": func(t *testing.T, h *host, tx *metadata.Tx) error {
		id, _ := anyLayer(tx)
		_, manifest := stacked(t)
		needless := layout.BlobNode(layout.BlobDigest(manifest))
		return errors.Join(
			tx.Link(layout.Edge{Parent: layout.LayerNode(id), Rel: layout.RelFiles, Child: needless}),
			tx.Link(layout.Edge{Parent: layout.LayerNode(id), Rel: layout.RelTarget, Child: needless}), // no relation of a layer's
			tx.Link(layout.Edge{Parent: layout.BlobNode(layout.BlobDigest(manifest)), Rel: layout.RelContent, Child: needless}),
		)
	},
	"E4": func(_ *testing.T, h *host, tx *metadata.Tx) error {
		d := layout.BlobDigest(digest.FromString("unheld"))
		if err := os.WriteFile(h.blob(string(d)), []byte("unheld"), 0o444); err != nil {
			return err
		}
		return tx.Blobs().Put(d, layout.BlobRecord{Size: 6, Created: time.Now()})
	},
	"K1": func(_ *testing.T, h *host, tx *metadata.Tx) error {
		return tx.Cache().Put("odd", layout.CacheRecord{LastUse: time.Now()})
	},
	"M4": func(_ *testing.T, h *host, _ *metadata.Tx) error { return flip(filepath.Join(h.root, layout.LogFile)) },
	"N1": func(_ *testing.T, h *host, _ *metadata.Tx) error {
		dir := filepath.Join(h.root, layout.IngestDir, "odd")
		return os.MkdirAll(filepath.Join(dir, "more"), 0o700)
	},
}

func anyLayer(tx *metadata.Tx) (id layout.LayerID, rec layout.LayerRecord) {
	_ = tx.Layers().Each("", func(l layout.LayerID, r layout.LayerRecord) error {
		if r.ChainID == "" && r.DiffID != "" {
			id, rec = l, r
		}
		return nil
	})
	return id, rec
}

// TestRecordsHeal breaks each of these while the store is open, and repairs it
// online.
func TestRecordsHeal(t *testing.T) {
	h := newHost(t)
	ctx := t.Context()
	var db *metadata.DB
	e, err := daemon.Open(ctx, daemon.Options{Root: h.root, State: h.state, Opened: func(_ *durable.Root, opened *metadata.DB) { db = opened }})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Create(ctx, varve.CreateRequest{Image: h.remote + "/busybox:1", Name: "c", Command: []string{"true"}}, nil); err != nil {
		t.Fatal(err)
	}
	for _, invariant := range slices.Sorted(maps.Keys(mishaps)) {
		t.Run(invariant, func(t *testing.T) {
			if err := db.Update(ctx, func(tx *metadata.Tx) error { return mishaps[invariant](t, h, tx) }); err != nil {
				t.Fatal(err)
			}
			found, err := e.Fsck(ctx, varve.FsckRequest{Level: string(layout.Normal), Plan: true}, nil)
			if err != nil || !strings.Contains(string(found.Report), `"invariant":"`+invariant+`"`) {
				t.Fatalf("not found: %v\n%s", err, found.Text)
			}
			r, err := e.Fsck(ctx, varve.FsckRequest{Level: string(layout.Normal), Repair: true}, nil)
			if err != nil || r.ExitCode != 0 {
				t.Errorf("%v: exit code %d\n%s", err, r.ExitCode, r.Text)
			}
		})
	}
	if err := e.Close(context.Background()); err != nil {
		t.Error(err)
	}
	h.whole(t, varve.FsckReport{})
}

// TestBooksHeal makes what the records add up to wrong, as only a bug or a
// stranger can.
func TestBooksHeal(t *testing.T) {
	h := newHost(t)
	ctx := t.Context()
	db, err := bolt.Open(filepath.Join(h.root, layout.DatabaseFile), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		uses, meta := tx.Bucket([]byte(layout.BucketUses)), tx.Bucket([]byte(layout.BucketMeta))
		first, _ := uses.Cursor().First()
		sum := uses.Sequence() - layout.EntrySum(first, nil)
		var state layout.StateRecord
		old := meta.Get([]byte(layout.StateKey))
		err := errors.Join(uses.Delete(first), uses.SetSequence(sum), layout.Decode(layout.BucketMeta, layout.StateKey, old, &state))
		sum = meta.Sequence() - layout.EntrySum([]byte(layout.StateKey), old)
		state.Commit = uint64(tx.ID())
		state.Accounts.Add(layout.AccountBlobs, layout.Usage{Bytes: 4096})
		value, eerr := layout.Encode(layout.StateKey, state)
		sum += layout.EntrySum([]byte(layout.StateKey), value)
		return errors.Join(err, eerr, meta.Put([]byte(layout.StateKey), value), meta.SetSequence(sum))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	e, err := daemon.Open(ctx, daemon.Options{Root: h.root, State: h.state})
	if err != nil {
		t.Fatal(err)
	}
	found, err := e.Fsck(ctx, varve.FsckRequest{Level: string(layout.Normal), Repair: true}, nil)
	if err != nil || found.ExitCode != 0 || !strings.Contains(found.Text, "accounts: ") || !strings.Contains(found.Text, "uses: ") {
		t.Errorf("%v: exit code %d\n%s", err, found.ExitCode, found.Text)
	}
	if err := e.Close(context.Background()); err != nil {
		t.Error(err)
	}
	h.whole(t, varve.FsckReport{})
}
