package snapshotter_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layer"
	"varve.dev/layout"
)

// TestAwkwardEqualsContainerd unpacks the image that has every special case
// both ways, layer by layer, and compares the trees: varve's without parents
// and in parallel, containerd's archive.Apply with them and in order.
func TestAwkwardEqualsContainerd(t *testing.T) {
	testkit.NeedRoot(t)
	img := testkit.Awkward(t)
	o := teststore.New(t)
	began := time.Now().Add(-time.Second).UnixNano() // the kernel's stamps lag
	streams, diffs := layersOf(t, img)
	top := unpackStreams(t, o, streams, diffs)
	ours, err := o.Snaps.Layers(t.Context(), top)
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(ours)
	theirs := applyAll(t, streams)
	if len(ours) != len(theirs) {
		t.Fatalf("%d layers, containerd has %d", len(ours), len(theirs))
	}
	files := 0
	for i := range ours {
		m, err := layer.Walk(t.Context(), theirs[i], layer.WalkOptions{})
		if err != nil {
			t.Fatal(err)
		}
		files += len(m.Entries)
		compareManifests(t, began, i, ours[i].Manifest, m)
	}
	t.Logf("%d layers with %d inodes compared", len(ours), files)
}

// layersOf returns the uncompressed layers of an image.
func layersOf(t *testing.T, img testkit.Image) (streams [][]byte, diffs []layout.DiffID) {
	t.Helper()
	manifest, config := testkit.ReadImage(t, img)
	for i, desc := range manifest.Layers {
		f, err := os.Open(testkit.BlobPath(img.Dir, desc.Digest))
		if err != nil {
			t.Fatal(err)
		}
		r, _, err := layer.Decompress(f)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		streams = append(streams, data)
		diffs = append(diffs, layout.DiffID(config.RootFS.DiffIDs[i]))
	}
	return streams, diffs
}

func unpackStreams(t *testing.T, o *teststore.Store, streams [][]byte, diffs []layout.DiffID) layout.SnapshotKey {
	t.Helper()
	lease := o.DB.NewLease("test")
	barrier := o.Root.NewBarrier()
	u, err := o.Snaps.Begin(t.Context(), lease, diffs, barrier)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Abandon()
	errs := make(chan error, len(streams))
	for i := range streams {
		go func() { errs <- u.Layer(t.Context(), i, strings.NewReader(string(streams[i]))) }()
	}
	for range streams {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	in := layout.IntentRecord{Purpose: "awkward"}
	top, err := u.Finish(t.Context(), &in)
	if err != nil {
		t.Fatal(err)
	}
	in.Edges = append(in.Edges, layout.Edge{Parent: layout.ContainerdNode, Rel: layout.RelHolds, Child: layout.SnapshotNode(top)})
	if err := o.Journal.Publish(t.Context(), barrier, in); err != nil {
		t.Fatal(err)
	}
	return top
}

// applyAll unpacks as containerd's overlay snapshotter does: whiteouts
// converted, the directories below given as parents. A hard link into a lower
// layer it cannot make there; such a layer is applied on a mounted overlay of
// everything below, where link(2) copies the target up.
func applyAll(t *testing.T, streams [][]byte) []string {
	t.Helper()
	base := t.TempDir()
	var dirs []string
	for i, s := range streams {
		dir := filepath.Join(base, fmt.Sprint(i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		parents := slices.Clone(dirs)
		slices.Reverse(parents)
		_, err := archive.Apply(context.Background(), dir, strings.NewReader(string(s)),
			archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(parents))
		if err != nil {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			applyMounted(t, dir, parents, s)
		}
		dirs = append(dirs, dir)
	}
	return dirs
}

func applyMounted(t *testing.T, dir string, parents []string, stream []byte) {
	t.Helper()
	work, merged := dir+"-work", dir+"-merged"
	for _, d := range []string{dir, work, merged} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	options := fmt.Sprintf("index=off,metacopy=off,redirect_dir=off,lowerdir=%s,upperdir=%s,workdir=%s", strings.Join(parents, ":"), dir, work)
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(merged, 0)
	if _, err := archive.Apply(context.Background(), merged, strings.NewReader(string(stream))); err != nil {
		t.Fatal(err)
	}
}

// opaqueLayer removes a directory and brings one of the same name. varve makes
// the new one opaque, for overlayfs would otherwise show what the old one held
// (OCI image-spec, layer.md: a whiteout applies to the layers below); with
// containerd's tree that depends on the order of the two entries.
const opaqueLayer = 5

// compareManifests compares two trees entry by entry. Not compared is the
// root directory, which no stream describes, and the time of what containerd
// leaves with the moment of its unpacking: whiteouts, and directories that a
// stream implies (it copies the parent's time and then puts files into them).
// varve gives these the stream's and the lower layer's time.
func compareManifests(t *testing.T, began int64, layerNumber int, ours, theirs *layer.Manifest) {
	t.Helper()
	left, right := byName(ours), byName(theirs)
	for name, a := range left {
		b, ok := right[name]
		if !ok {
			t.Errorf("layer %d: %s: containerd has no such file", layerNumber, name)
			continue
		}
		if layerNumber == opaqueLayer && name == "opaque/sub" {
			a.xattrs = "" // see opaqueLayer
		}
		if a != b && !(b.mtime >= began && withoutTime(a) == withoutTime(b)) {
			t.Errorf("layer %d: %s:\n varve      %+v\n containerd %+v", layerNumber, name, a, b)
		}
	}
	for name := range right {
		if _, ok := left[name]; !ok {
			t.Errorf("layer %d: %s: varve has no such file", layerNumber, name)
		}
	}
}

// described is an entry in comparable form.
type described struct {
	kind, mode, uid, gid uint32
	mtime, size          int64
	sha, target, names   string
	rdev                 uint64
	xattrs               string
}

func withoutTime(d described) described {
	d.mtime = 0
	return d
}

func byName(m *layer.Manifest) map[string]described {
	out := map[string]described{}
	for _, e := range m.Entries {
		var attrs []string
		for k, v := range e.Xattrs {
			attrs = append(attrs, fmt.Sprintf("%s=%q", k, v))
		}
		slices.Sort(attrs)
		for _, n := range e.Names {
			if n == "." {
				continue
			}
			d := described{
				kind: e.Mode & unix.S_IFMT, mode: e.Mode, uid: e.UID, gid: e.GID, mtime: e.MTime, size: e.Size,
				sha: e.SHA256, target: e.Target, names: strings.Join(e.Names, "|"), rdev: e.Rdev, xattrs: strings.Join(attrs, " "),
			}
			out[n] = d
		}
	}
	return out
}
