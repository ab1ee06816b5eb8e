package repair_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/api/varve"
	"varve.dev/daemon"
	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/internal/testbuild"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/repair"
)

// victim is the layer that the tests damage, from the bottom.
const victim = 2

// victimFile is a file of it.
const victimFile = "layer02/d000/f0003"

// stacked returns the manifest of the image.
func stacked(t *testing.T) (m ocispec.Manifest, digest string) {
	t.Helper()
	img := testkit.Stacked(t, 4, 30)
	data, err := os.ReadFile(filepath.Join(img.Dir, "blobs", "sha256", img.Target.Digest.Encoded()))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	return m, img.Target.Digest.String()
}

func (h *host) blob(d string) string {
	return filepath.Join(h.root, layout.BlobPath(layout.BlobDigest(d)))
}

// stepOf returns the step that a repair took for an object.
func stepOf(t *testing.T, r varve.FsckReport, object string) *repair.Step {
	t.Helper()
	var p repair.Plan
	if err := json.Unmarshal(r.Plan, &p); err != nil {
		t.Fatal(err)
	}
	for _, s := range p.Steps {
		if strings.HasPrefix(s.Object, object) {
			return s
		}
	}
	t.Fatalf("no step for %s:\n%s", object, r.Text)
	return nil
}

// damage flips a bit in the victim's file, whose blob goes.
func (h *host) damage(t *testing.T) (blobSize int64) {
	t.Helper()
	m, _ := stacked(t)
	if err := errors.Join(flip(h.find(t, victimFile)), os.Remove(h.blob(m.Layers[victim].Digest.String()))); err != nil {
		t.Fatal(err)
	}
	return m.Layers[victim].Size
}

// Without the blob at most that layer is fetched.
func TestHealsFromTheRegistry(t *testing.T) {
	h := newHost(t)
	size := h.damage(t)
	r := h.repair(t)
	h.whole(t, r)
	blob, layer := stepOf(t, r, "blob"), stepOf(t, r, "layer")
	if fetched := blob.Done.Fetched + layer.Done.Fetched; fetched != size {
		t.Errorf("%d bytes fetched, the layer has %d:\n%s", fetched, size, r.Text)
	}
}

// Without blob and registry, another layer with the same content will do.
func TestHealsFromAnotherLayer(t *testing.T) {
	h := newHost(t)
	h.with(t, func(ctx context.Context, e *daemon.Engine) {
		_, err := testbuild.Run(ctx, e, testbuild.Build{
			Name: "twin:1", Dockerfile: "FROM scratch\nCOPY --from=" + h.remote + "/stacked:1 /" + victimFile + " /copy\n",
		})
		if err != nil {
			t.Fatal(err)
		}
	})
	h.trees = h.hash(t)
	h.damage(t)
	h.registry.Stop()
	r := h.repair(t)
	if from := stepOf(t, r, "layer").Done.From; !strings.HasPrefix(from, "other files") {
		t.Errorf("healed from %q:\n%s", from, r.Text)
	}
	for id, hash := range h.hash(t) {
		if h.trees[id] != hash {
			t.Errorf("layer %s is not what it was:\n%s", id, r.Text)
		}
	}
}

// What nobody has stays damaged, is not used, and is healed by a pull.
func TestNobodyHasIt(t *testing.T) {
	h := newHost(t)
	h.damage(t)
	h.registry.Stop()
	r := h.repair(t)
	image := h.remote + "/stacked:1"
	if s := stepOf(t, r, "layer"); s.Done.Healed || len(s.Done.Breaks) != 1 || s.Done.Breaks[0] != image || r.ExitCode != 2 {
		t.Errorf("exit code %d:\n%s", r.ExitCode, r.Text)
	}
	create := func(ctx context.Context, e *daemon.Engine) error {
		_, err := e.Create(ctx, varve.CreateRequest{Image: image, Command: []string{"true"}, Pull: "never"}, nil)
		return err
	}
	h.with(t, func(ctx context.Context, e *daemon.Engine) {
		if c := errdefs.AsCorrupt(create(ctx, e)); c == nil || c.Invariant != "L4" {
			t.Errorf("a container of it: %v", c)
		}
		_, err := testbuild.Run(ctx, e, testbuild.Build{Name: "x:1", Dockerfile: "FROM " + image + "\nWORKDIR /new\n"})
		if err == nil || !strings.Contains(err.Error(), "L4") {
			t.Errorf("a build on it: %v", err)
		}
	})
	for id, hash := range h.hash(t) {
		if h.trees[id] == "" { // what the build was sent
			h.trees[id] = hash
		}
	}
	h.startRegistry(t)
	h.with(t, func(ctx context.Context, e *daemon.Engine) {
		h.pull(t, e, "stacked:1")
		if err := create(ctx, e); err != nil {
			t.Errorf("a container after the pull: %v", err)
		}
	})
	h.whole(t, varve.FsckReport{})
}

// Documents come back from the registry; a file manifest from its layer.
func TestBlobsHeal(t *testing.T) {
	h := newHost(t)
	m, manifest := stacked(t)
	var files []string
	h.open(t, func(db *metadata.DB) {
		err := db.View(t.Context(), func(tx *metadata.Tx) error {
			return tx.Layers().Each("", func(_ layout.LayerID, l layout.LayerRecord) error {
				files = append(files, string(l.Manifest))
				return nil
			})
		})
		if err != nil {
			t.Fatal(err)
		}
	})
	for what, c := range map[string]struct {
		blob    string
		fetched bool
	}{
		"manifest": {manifest, true}, "config": {m.Config.Digest.String(), true}, "layer": {m.Layers[0].Digest.String(), true}, "file manifest": {files[0], false},
	} {
		for damage, do := range map[string]func(string) error{
			"flipped": flip, "gone": os.Remove, "empty": func(name string) error { return os.Truncate(name, 0) },
			"is a directory": func(name string) error { return errors.Join(os.Remove(name), os.Mkdir(name, 0o755)) },
		} {
			t.Run(what+" "+damage, func(t *testing.T) {
				if err := do(h.blob(c.blob)); err != nil {
					t.Fatal(err)
				}
				r := h.repair(t)
				h.whole(t, r)
				if s := stepOf(t, r, "blob "+c.blob); s.Done.Fetched > 0 != c.fetched {
					t.Errorf("%d bytes fetched:\n%s", s.Done.Fetched, r.Text)
				}
			})
		}
	}
	// A pull and a run notice what they touch.
	for _, blob := range []string{manifest, m.Config.Digest.String(), m.Layers[1].Digest.String()} {
		if err := os.Truncate(h.blob(blob), 0); err != nil {
			t.Fatal(err)
		}
		h.with(t, func(_ context.Context, e *daemon.Engine) { h.pull(t, e, "stacked:1") })
		h.whole(t, varve.FsckReport{})
	}
	if err := os.RemoveAll(filepath.Join(h.find(t, victimFile), "../../..")); err != nil {
		t.Fatal(err)
	}
	h.with(t, func(ctx context.Context, e *daemon.Engine) {
		if _, err := e.Create(ctx, varve.CreateRequest{Image: h.remote + "/stacked:1", Command: []string{"true"}, Pull: "never"}, nil); err != nil {
			t.Errorf("a container: %v", err)
		}
	})
	h.whole(t, varve.FsckReport{})
}

// open gives fn the database.
func (h *host) open(t *testing.T, fn func(*metadata.DB)) {
	t.Helper()
	e, err := daemon.Open(t.Context(), daemon.Options{Root: h.root, State: h.state, Opened: func(_ *durable.Root, db *metadata.DB) { fn(db) }})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

func (h *host) startRegistry(t *testing.T) {
	t.Helper()
	r, err := testkit.StartRegistry(t.Context(), filepath.Dir(h.registry.Storage), h.registry.Addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
}
