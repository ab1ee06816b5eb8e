package snapshotter_test

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layer"
	"varve.dev/layout"
	"varve.dev/overlay"
)

// difference is a reason for which an entry may look different elsewhere.
type difference struct {
	reason string
	is     func(ours, theirs described) bool
}

// umociDiffers are the reasons for which a name of the awkward image may look
// different in umoci's tree.
var umociDiffers = []difference{
	{
		"umoci unpacks all layers into one folder, where a link into a lower layer is one file with it; an overlay gives each layer a copy of its own",
		func(ours, theirs described) bool {
			for name := range strings.SplitSeq(ours.names, "|") {
				if !slices.Contains(strings.Split(theirs.names, "|"), name) {
					return false
				}
			}
			ours.names = theirs.names
			return ours == theirs
		},
	},
	{
		"umoci leaves a directory that a layer implies, and the one it is in, with the moment of the unpacking",
		func(ours, theirs described) bool {
			return ours.kind == unix.S_IFDIR && withoutTime(ours) == withoutTime(theirs)
		},
	},
	{
		"umoci drops an xattr without a value",
		func(ours, theirs described) bool {
			ours.xattrs = strings.ReplaceAll(ours.xattrs, `user.b="" `, "")
			return ours == theirs
		},
	},
}

// TestAwkwardBesideUmoci compares the whole image as a container sees it with
// what Debian's umoci unpacks: they differ for the reasons listed, in no other
// way, and no reason is left over.
func TestAwkwardBesideUmoci(t *testing.T) {
	testkit.NeedRoot(t)
	testkit.Need(t, "umoci", "umoci")
	o := teststore.New(t)
	streams, diffs := layersOf(t, testkit.Awkward(t))
	left := byName(walkSnapshot(t, o, unpackStreams(t, o, streams, diffs)))
	m, err := layer.Walk(t.Context(), umociUnpack(t, streams), layer.WalkOptions{})
	if err != nil {
		t.Fatal(err)
	}
	right := byName(m)
	count := make([]int, len(umociDiffers))
	for name, a := range left {
		b, ok := right[name]
		if !ok {
			t.Errorf("%s: umoci has no such file", name)
			continue
		}
		if a == b {
			continue
		}
		why := slices.IndexFunc(umociDiffers, func(d difference) bool { return d.is(a, b) })
		if why < 0 {
			t.Errorf("%s:\n varve %+v\n umoci %+v", name, a, b)
			continue
		}
		count[why]++
	}
	for name := range right {
		if _, ok := left[name]; !ok {
			t.Errorf("%s: varve has no such file", name)
		}
	}
	t.Logf("%d names compared", len(left))
	for i, d := range umociDiffers {
		t.Logf("%d differ: %s", count[i], d.reason)
		if count[i] == 0 {
			t.Errorf("nothing differs any more for this reason: %s", d.reason)
		}
	}
}

// walkSnapshot describes the tree that a container on top of a snapshot sees.
func walkSnapshot(t *testing.T, o *teststore.Store, top layout.SnapshotKey) *layer.Manifest {
	t.Helper()
	if _, err := o.Snaps.View(t.Context(), "view", string(top)); err != nil {
		t.Fatal(err)
	}
	tree, err := o.Snaps.Tree(t.Context(), "view")
	if err != nil {
		t.Fatal(err)
	}
	merged := t.TempDir()
	if err := overlay.Mount(tree, merged); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(merged, 0); err != nil {
			t.Error(err)
		}
	}()
	m, err := layer.Walk(t.Context(), merged, layer.WalkOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// umociUnpack unpacks the layers as gzip: umoci 0.4 knows no zstd.
func umociUnpack(t *testing.T, streams [][]byte) string {
	t.Helper()
	l, err := testkit.NewLayout(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var layers []testkit.Layer
	for _, s := range streams {
		layer, err := l.AddTar(testkit.Gzip, "", bytes.NewReader(s))
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, layer)
	}
	manifest, err := l.AddImage(ocispec.ImageConfig{}, layers...)
	if err != nil {
		t.Fatal(err)
	}
	img, err := l.Finish("awkward", manifest)
	if err != nil {
		t.Fatal(err)
	}
	bundle := filepath.Join(t.TempDir(), "bundle")
	out, err := exec.Command("umoci", "unpack", "--image", img.Dir+":awkward", bundle).CombinedOutput()
	if err != nil {
		t.Fatalf("umoci: %v: %s", err, out)
	}
	return filepath.Join(bundle, "rootfs")
}
