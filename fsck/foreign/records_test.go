package foreign_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/fsck/foreign"
	"varve.dev/layout"
)

// write replaces what a file says.
func write(text string) func(string) error {
	return func(name string) error { return os.WriteFile(name, []byte(text), 0o644) }
}

func TestDamagedDockerRecords(t *testing.T) {
	made := makeDocker(t, bitOfAll(t))
	damage, loss, notice := layout.Damage, layout.Loss, layout.Notice
	mount := "image/overlay2/layerdb/mounts/" + strings.Repeat("c", 64)
	container := "containers/" + strings.Repeat("c", 64)
	for _, c := range []struct {
		name string
		at   func(r dockerRoot) string
		do   func(string) error
		want func(r dockerRoot) []finding // nil: one, of the kind, at the place
		kind foreign.Kind
		is   layout.Severity
	}{
		{name: "names emptied", at: in("image/overlay2/repositories.json"), do: truncate, kind: foreign.Empty, is: loss},
		{name: "names removed", at: in("image/overlay2/repositories.json"), do: os.Remove, kind: foreign.Missing, is: loss},
		{name: "names no JSON", at: in("image/overlay2/repositories.json"), do: shorten, kind: foreign.Record, is: loss},
		{name: "config removed", at: dockerRoot.config, do: os.Remove, kind: foreign.Missing, is: damage},
		{name: "config emptied", at: dockerRoot.config, do: truncate, kind: foreign.Empty, is: damage},
		{name: "config flipped", at: dockerRoot.config, do: flip, kind: foreign.Altered, is: damage},
		{name: "diff emptied", at: of(1, "diff"), do: truncate, kind: foreign.Empty, is: damage},
		{name: "diff no digest", at: of(1, "diff"), do: write("sha256:1"), kind: foreign.Record, is: damage},
		{name: "cache-id emptied", at: of(1, "cache-id"), do: truncate, want: func(r dockerRoot) []finding {
			return []finding{{foreign.Empty, damage, of(1, "cache-id")(r)}, {foreign.Extra, notice, r.cache(1)}}
		}},
		{name: "cache-id elsewhere", at: of(1, "cache-id"), do: write("../../x"), want: func(r dockerRoot) []finding {
			return []finding{{foreign.Record, damage, of(1, "cache-id")(r)}, {foreign.Extra, notice, r.cache(1)}}
		}},
		{name: "parent removed", at: of(1, "parent"), do: os.Remove, kind: foreign.Missing, is: damage},
		{name: "parent emptied", at: of(1, "parent"), do: truncate, kind: foreign.Empty, is: damage},
		{name: "size emptied", at: of(0, "size"), do: truncate, kind: foreign.Empty, is: damage},
		{name: "size no number", at: of(0, "size"), do: write("x"), kind: foreign.Record, is: damage},
		{name: "link emptied", at: in("overlay2/" + dockerRoot{}.cache(0) + "/link"), do: truncate, kind: foreign.Empty, is: damage},
		{name: "lower emptied", at: in("overlay2/" + dockerRoot{}.cache(1) + "/lower"), do: truncate, kind: foreign.Empty, is: damage},
		{name: "lower too long", at: in("overlay2/" + dockerRoot{}.cache(1) + "/lower"), do: write("l/a:l/b"), kind: foreign.Record, is: damage},
		{name: "mount-id emptied", at: in(mount + "/mount-id"), do: truncate, want: func(dockerRoot) []finding {
			return []finding{{foreign.Empty, loss, mount + "/mount-id"}, {foreign.Extra, notice, "overlay2/" + strings.Repeat("d", 64)}}
		}},
		{name: "mount's parent no digest", at: in(mount + "/parent"), do: write("x"), kind: foreign.Record, is: loss},
		{name: "container's config emptied", at: in(container + "/config.v2.json"), do: truncate, kind: foreign.Empty, is: loss},
		{name: "container's config removed", at: in(container + "/config.v2.json"), do: os.Remove, kind: foreign.Missing, is: loss},
		{name: "container's tree removed", at: in("overlay2/" + strings.Repeat("d", 64) + "/diff"), do: os.RemoveAll, kind: foreign.Missing, is: loss},
		{name: "source emptied", at: func(r dockerRoot) string {
			return "image/overlay2/distribution/v2metadata-by-diffid/sha256/" + r.diffs[0].Encoded()
		}, do: truncate, kind: foreign.Record, is: notice},
		{name: "a tree that nothing names", at: in("overlay2/" + strings.Repeat("e", 64)), do: func(n string) error { return os.MkdirAll(n+"/diff", 0o755) }, kind: foreign.Extra, is: notice},
		{name: "a tree of BuildKit's", at: in("overlay2/" + strings.Repeat("z", 25)), do: func(n string) error { return os.MkdirAll(n+"/diff", 0o755) }, want: func(dockerRoot) []finding { return nil }},
		{name: "tar-split emptied", at: of(0, "tar-split.json.gz"), do: truncate, want: func(r dockerRoot) []finding {
			return []finding{{foreign.Empty, damage, of(0, "tar-split.json.gz")(r)}, {foreign.Unchecked, notice, r.cache(0) + "/diff"}}
		}},
		{name: "tar-split removed", at: of(0, "tar-split.json.gz"), do: os.Remove, want: func(r dockerRoot) []finding {
			return []finding{{foreign.Missing, damage, of(0, "tar-split.json.gz")(r)}, {foreign.Unchecked, notice, r.cache(0) + "/diff"}}
		}},
		{name: "tar-split cut short", at: of(0, "tar-split.json.gz"), do: shorten, want: func(r dockerRoot) []finding {
			return []finding{{foreign.Record, damage, of(0, "tar-split.json.gz")(r)}, {foreign.Unchecked, notice, r.cache(0) + "/diff"}}
		}},
		{name: "tar-split of another layer", at: of(0, "tar-split.json.gz"), do: write("\x1f\x8b\b\x00\x00\x00\x00\x00\x00\xff\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00"), want: func(r dockerRoot) []finding {
			// One of nothing: everything in the tree is too much.
			out := []finding{{foreign.Record, damage, of(0, "tar-split.json.gz")(r)}}
			for _, name := range []string{"capable", "d", "fifo", "gone", "hard", "hidden", "implied", "null"} {
				out = append(out, finding{foreign.Extra, damage, "/diff/" + name})
			}
			return out
		}},
		{name: "layer removed", at: of(1, ""), do: os.RemoveAll, want: func(r dockerRoot) []finding {
			return []finding{{foreign.Missing, damage, r.chains[1].Encoded()}, {foreign.Missing, damage, mount + "/parent"}, {foreign.Extra, notice, r.cache(1)}}
		}},
		{name: "diff of another layer", at: of(1, "diff"), do: write("sha256:" + strings.Repeat("a", 64)), want: func(r dockerRoot) []finding {
			return []finding{{foreign.Record, damage, r.chains[1].Encoded()}}
		}},
		{name: "tree removed", at: in("overlay2/" + dockerRoot{}.cache(0)), do: os.RemoveAll, want: func(r dockerRoot) []finding {
			return []finding{{foreign.Missing, damage, r.cache(0) + "/diff"}, {foreign.Missing, damage, r.cache(0) + "/link"}, {foreign.Record, damage, r.cache(1) + "/lower"}}
		}},
		{name: "short name removed", at: func(r dockerRoot) string { return "overlay2/l/" + r.cache(0)[38:] }, do: os.Remove, want: func(r dockerRoot) []finding {
			return []finding{{foreign.Missing, damage, "overlay2/l/" + r.cache(0)[38:]}, {foreign.Missing, damage, r.cache(1) + "/lower"}}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := made
			r.dir = copyOf(t, made.dir)
			must(t, c.do(r.path(c.at(r))))
			want := []finding{{c.kind, c.is, c.at(r)}}
			if c.want != nil {
				want = c.want(r)
			}
			wantFindings(t, check(t, foreign.Docker, r.dir), want...)
		})
	}
}

func in(name string) func(dockerRoot) string { return func(dockerRoot) string { return name } }

func of(layer int, record string) func(dockerRoot) string {
	return func(r dockerRoot) string { return strings.TrimSuffix(r.record(layer, record), "/") }
}

func (r dockerRoot) config() string {
	return "image/overlay2/imagedb/content/sha256/" + r.image.Encoded()
}

// A layer that no registry is known to have is lost with one of its files, but
// not with a file's mode.
func TestDockerLoss(t *testing.T) {
	r := makeDocker(t, bitOfAll(t))
	must(t, os.RemoveAll(r.path("image/overlay2/distribution")))
	wantClean(t, check(t, foreign.Docker, r.dir))
	must(t, os.Chmod(filepath.Join(r.tree(0), "d/other"), 0o600))
	wantFindings(t, check(t, foreign.Docker, r.dir), finding{foreign.Mode, layout.Damage, "/d/other"})
	must(t, flip(filepath.Join(r.tree(0), "d/other")))
	wantFindings(t, check(t, foreign.Docker, r.dir), finding{foreign.Mode, layout.Damage, "/d/other"}, finding{foreign.Altered, layout.Loss, "/d/other"})
}

func TestDockerInUse(t *testing.T) {
	r := makeDocker(t, bitOfAll(t))
	r.write(t, "volumes/metadata.db", "x")
	wantClean(t, check(t, foreign.Docker, r.dir))
	f, err := os.Open(r.path("volumes/metadata.db"))
	must(t, err, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	defer f.Close()
	wantFindings(t, check(t, foreign.Docker, r.dir), finding{foreign.InUse, layout.Notice, "volumes/metadata.db"})
}

func TestDockerRootsOfOthers(t *testing.T) {
	for _, c := range []struct {
		dir, says string
		kind      error
	}{
		{"image/btrfs", "btrfs", errdefs.ErrNotImplemented},
		{"100000.100000/image/overlay2", "100000.100000", errdefs.ErrNotFound},
		{"containerd/daemon", "containerd", errdefs.ErrNotFound},
	} {
		dir := t.TempDir()
		must(t, os.MkdirAll(filepath.Join(dir, c.dir), 0o755))
		_, err := foreign.Run(t.Context(), foreign.Options{Engine: foreign.Docker, Root: dir})
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.dir, err)
		}
	}
}

// A daemon in a user namespace has other owners than its layers.
func TestDockerInUserNamespace(t *testing.T) {
	r := makeDocker(t, bitOfAll(t))
	must(t, os.Chown(r.dir, 1000, 1000), filepath.WalkDir(r.tree(0), func(name string, d os.DirEntry, err error) error {
		if err != nil || d.Name() == "capable" { // whose capability a change of owner would take
			return err
		}
		return os.Lchown(name, 100000, 100000)
	}))
	wantFindings(t, check(t, foreign.Docker, r.dir), finding{foreign.Unchecked, layout.Notice, ""})
}

func TestDamagedContainerdRecords(t *testing.T) {
	made := makeContainerd(t, bitOfAll(t))
	damage, loss, notice := layout.Damage, layout.Loss, layout.Notice
	const meta, snapshots = "io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db"
	const uuid = "io.containerd.grpc.v1.introspection/uuid"
	blob := func(layer int) func(r containerdRoot) string {
		return func(r containerdRoot) string {
			return "io.containerd.content.v1.content/" + blobAt(r.manifest.Layers[layer].Digest)
		}
	}
	config := func(r containerdRoot) string {
		return "io.containerd.content.v1.content/" + blobAt(r.manifest.Config.Digest)
	}
	file := func(name string) func(containerdRoot) string { return func(containerdRoot) string { return name } }
	tree := func(layer int) func(containerdRoot) string {
		return func(r containerdRoot) string { return strings.TrimPrefix(r.tree(t, layer), r.dir+"/") }
	}
	withUUID := func(text string) func(string) error {
		return func(name string) error {
			return errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte(text), 0o600))
		}
	}
	for _, c := range []struct {
		name string
		at   func(r containerdRoot) string
		do   func(string) error
		kind foreign.Kind
		is   layout.Severity
		more func(r containerdRoot) []finding // besides
	}{
		{"meta.db emptied", file(meta), truncate, foreign.Empty, loss, nil},
		{"meta.db removed", file(meta), os.Remove, foreign.Missing, loss, nil},
		{"meta.db no database", file(meta), write(strings.Repeat("x", 1<<16)), foreign.Record, loss, nil},
		{"metadata.db emptied", file(snapshots), truncate, foreign.Empty, loss, nil},
		{"metadata.db no database", file(snapshots), write(strings.Repeat("x", 1<<16)), foreign.Record, loss, nil},
		{"config emptied", config, truncate, foreign.Empty, damage, nil},
		{"config flipped", config, flip, foreign.Altered, damage, nil},
		{"blob removed", blob(0), os.Remove, foreign.Missing, damage, unchecked(tree(0))},
		{"blob emptied", blob(0), truncate, foreign.Empty, damage, unchecked(tree(0))},
		{"blob cut short", blob(0), shorten, foreign.Short, damage, unchecked(tree(0))},
		{"blob flipped", blob(1), flip, foreign.Altered, damage, unchecked(tree(1))},
		{"tree removed", tree(0), os.RemoveAll, foreign.Missing, damage, nil},
		{"uuid emptied", file(uuid), withUUID(""), foreign.Empty, damage, nil},
		{"uuid cut short", file(uuid), withUUID("e6faaec4-1149"), foreign.Record, damage, nil},
		{"a blob that nothing names", file("io.containerd.content.v1.content/blobs/sha256/stray"), write("x"), foreign.Extra, notice, nil},
		{"a tree that nothing names", file("io.containerd.snapshotter.v1.overlayfs/snapshots/99"), func(n string) error { return os.Mkdir(n, 0o755) }, foreign.Extra, notice, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := made
			r.dir = copyOf(t, made.dir)
			want := []finding{{c.kind, c.is, c.at(r)}}
			if c.more != nil {
				want = append(want, c.more(r)...)
			}
			must(t, c.do(filepath.Join(r.dir, c.at(r))))
			report := check(t, foreign.Containerd, r.dir)
			wantFindings(t, report, want...)
			for _, f := range report.Findings {
				if strings.HasPrefix(f.Object, "blob ") && (len(f.Images) != 1 || f.Images[0] != containerdName || !strings.Contains(f.Repair, "registry.example:5000/team/image")) {
					t.Errorf("%+v", f)
				}
			}
		})
	}
}

func unchecked(tree func(containerdRoot) string) func(containerdRoot) []finding {
	return func(r containerdRoot) []finding { return []finding{{foreign.Unchecked, layout.Notice, tree(r)}} }
}

// What a containerd has open is not read.
func TestContainerdInUse(t *testing.T) {
	r := makeContainerd(t, bitOfAll(t))
	db, err := bolt.Open(filepath.Join(r.dir, "io.containerd.metadata.v1.bolt/meta.db"), 0o600, nil)
	must(t, err)
	defer db.Close()
	_, err = foreign.Run(t.Context(), foreign.Options{Engine: foreign.Containerd, Root: r.dir})
	if !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "stop it") {
		t.Error(err)
	}
}

// No damage of a database, on any of its pages, ends the check.
func TestContainerdDamagedPages(t *testing.T) {
	r := makeContainerd(t, bitOfAll(t))
	for _, name := range []string{"io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db"} {
		name = filepath.Join(r.dir, name)
		data, err := os.ReadFile(name)
		must(t, err)
		for page := 0; page*4096 < len(data); page++ {
			for at := page * 4096; at < page*4096+64; at += 5 {
				bad := append([]byte{}, data...)
				bad[at] ^= 0x55
				must(t, os.WriteFile(name, bad, 0o600))
				if _, err := foreign.Run(t.Context(), foreign.Options{Engine: foreign.Containerd, Root: r.dir}); err != nil {
					t.Errorf("%s, byte %d: %v", name, at, err)
				}
			}
		}
		must(t, os.WriteFile(name, data, 0o600))
	}
	wantClean(t, check(t, foreign.Containerd, r.dir))
}

// The end of a context ends a check, with no report.
func TestCancelled(t *testing.T) {
	img := bitOfAll(t)
	docker, ctr := makeDocker(t, img), makeContainerd(t, img)
	for engine, root := range map[foreign.Engine]string{foreign.OCILayout: img.Dir, foreign.Docker: docker.dir, foreign.Containerd: ctr.dir} {
		ctx, cancel := context.WithCancel(t.Context())
		seen := int64(0)
		report, err := foreign.Run(ctx, foreign.Options{Engine: engine, Root: root, Workers: 1, Progress: func(done, total int64) {
			if done < seen || total < done {
				t.Errorf("%s: %d of %d after %d", engine, done, total, seen)
			}
			seen = done
			cancel()
		}})
		if !errors.Is(err, context.Canceled) || report != nil || seen == 0 {
			t.Errorf("%s: %v, %v", engine, report, err)
		}
	}
}

// The same image in two namespaces is two images of the same blobs.
func TestContainerdNamespaces(t *testing.T) {
	r := makeContainerd(t, bitOfAll(t), "default", "k8s.io")
	wantClean(t, check(t, foreign.Containerd, r.dir))
	must(t, truncate(filepath.Join(r.dir, "io.containerd.content.v1.content", blobAt(r.manifest.Config.Digest))))
	report := check(t, foreign.Containerd, r.dir)
	wantFindings(t, report, finding{foreign.Empty, layout.Damage, blobAt(r.manifest.Config.Digest)})
	if got := strings.Join(report.Findings[0].Images, " "); report.Images != 2 || got != "default/"+containerdName+" k8s.io/"+containerdName {
		t.Errorf("%d images, the blob is of %s", report.Images, got)
	}
}

// What a containerd says that it does not have is no finding, as long as the
// image can be run.
func TestContainerdHasNotAll(t *testing.T) {
	img := bitOfAll(t)
	made := makeContainerd(t, img)
	forget := func(blobs *bolt.Bucket, r containerdRoot, d string) error {
		return errors.Join(blobs.DeleteBucket([]byte(d)), os.Remove(filepath.Join(r.dir, "io.containerd.content.v1.content/blobs/sha256", d[len("sha256:"):])))
	}
	blobsOf := func(n *bolt.Bucket) *bolt.Bucket { return n.Bucket([]byte("content")).Bucket([]byte("blob")) }
	snapshots := "io.containerd.snapshotter.v1.overlayfs/snapshots"
	for _, c := range []struct {
		name string
		do   func(r containerdRoot, n *bolt.Bucket) error
		want []finding
	}{
		// As CRI does with discard_unpacked_layers.
		{"layers that were unpacked", func(r containerdRoot, n *bolt.Bucket) error {
			return errors.Join(forget(blobsOf(n), r, r.manifest.Layers[0].Digest.String()), forget(blobsOf(n), r, r.manifest.Layers[1].Digest.String()))
		}, []finding{{foreign.Unchecked, layout.Notice, snapshots}}},
		{"the manifest", func(r containerdRoot, n *bolt.Bucket) error { return forget(blobsOf(n), r, img.Target.Digest.String()) },
			[]finding{{foreign.Missing, layout.Damage, "meta.db"}}},
		{"the config", func(r containerdRoot, n *bolt.Bucket) error {
			return forget(blobsOf(n), r, r.manifest.Config.Digest.String())
		},
			[]finding{{foreign.Missing, layout.Damage, "meta.db"}}},
		{"a snapshot of a container", func(r containerdRoot, n *bolt.Bucket) error {
			containers, err := n.CreateBucketIfNotExists([]byte("containers"))
			if err != nil {
				return err
			}
			c, err := containers.CreateBucket([]byte("made"))
			if err != nil {
				return err
			}
			return errors.Join(c.Put([]byte("snapshotter"), []byte("overlayfs")), c.Put([]byte("snapshotKey"), []byte("nowhere")), c.Put([]byte("image"), []byte(containerdName)))
		}, []finding{{foreign.Missing, layout.Loss, "meta.db"}}},
		{"another snapshotter's", func(r containerdRoot, n *bolt.Bucket) error {
			s, err := n.Bucket([]byte("snapshots")).CreateBucket([]byte("btrfs"))
			if err != nil {
				return err
			}
			_, err = s.CreateBucket([]byte(r.chains[0]))
			return err
		}, []finding{{foreign.Unchecked, layout.Notice, "meta.db"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := made
			r.dir = copyOf(t, made.dir)
			r.change(t, func(n *bolt.Bucket) error { return c.do(r, n) })
			wantFindings(t, check(t, foreign.Containerd, r.dir), c.want...)
		})
	}
}
