//go:build clients || peers

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"varve.dev/image"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
	"varve.dev/metadata"
	"varve.dev/overlay"
)

// tool is another one that holds images.
type tool struct {
	name string
	pull func(t *testing.T, ref string)
	// load reads an archive that varve has saved; nil: it has no such thing.
	load func(t *testing.T, archive string)
	// push and save give away what the client has under a name.
	push func(t *testing.T, ref string)
	save func(t *testing.T, ref, archive string)
	// build makes an image of a build context; nil: it has no such thing.
	build func(t *testing.T, dir, ref string)
	// create makes a container of an image; nil: it is not asked to.
	create func(t *testing.T, ref string)
	// tree calls fn with a folder that shows what is in an image.
	tree func(t *testing.T, ref string, fn func(dir string))
}

// sh runs a program, which has to succeed, and returns what it printed.
func sh(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// serve starts a daemon for the length of the test and waits until ask, a
// question to it, succeeds.
func serve(t *testing.T, ask []string, name string, args ...string) {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	for deadline := time.Now().Add(30 * time.Second); exec.Command(ask[0], ask[1:]...).Run() != nil; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(log.Name())
			t.Fatalf("%s does not answer:\n%s", name, text)
		}
	}
}

// mounted mounts layers, the topmost first, for fn.
func mounted(t *testing.T, lowers []string, fn func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	if err := overlay.Mount(overlay.Tree{Lowers: lowers}, dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	fn(dir)
}

func docker(t *testing.T) tool { return dockerAt(t, t.TempDir()) }

func dockerAt(t *testing.T, dir string) tool {
	testkit.Need(t, "dockerd", "docker.io")
	host := "unix://" + dir + "/docker.sock"
	docker := func(t *testing.T, args ...string) string {
		return sh(t, "docker", append([]string{"-H", host}, args...)...)
	}
	t.Cleanup(func() { // what it leaves mounted
		_ = unix.Unmount(dir+"/data/overlay2", 0)
		_ = unix.Unmount(dir+"/exec/netns/default", 0)
	})
	serve(t, []string{"docker", "-H", host, "version"}, "dockerd", "--data-root", dir+"/data", "--exec-root", dir+"/exec",
		"--pidfile", dir+"/pid", "-H", host, "--bridge=none", "--iptables=false", "--storage-driver=overlay2")
	return tool{
		name: "docker",
		pull: func(t *testing.T, ref string) { docker(t, "pull", ref) },
		push: func(t *testing.T, ref string) { docker(t, "push", ref) },
		load: func(t *testing.T, archive string) { docker(t, "load", "-i", archive) },
		save: func(t *testing.T, ref, archive string) { docker(t, "save", "-o", archive, ref) },
		build: func(t *testing.T, dir, ref string) {
			docker(t, "build", "-q", "--network", "host", "-t", ref, dir)
		},
		create: func(t *testing.T, ref string) { docker(t, "create", "--network", "none", ref, "true") },
		tree: func(t *testing.T, ref string, fn func(string)) {
			dirs := docker(t, "image", "inspect", "-f", "{{.GraphDriver.Data.UpperDir}}:{{.GraphDriver.Data.LowerDir}}", ref)
			lowers := strings.Split(strings.TrimSpace(dirs), ":")
			if lowers[len(lowers)-1] == "<no value>" {
				lowers = lowers[:len(lowers)-1]
			}
			mounted(t, lowers, fn)
		},
	}
}

func podman(t *testing.T) tool {
	testkit.Need(t, "podman", "podman")
	dir := t.TempDir()
	podman := func(t *testing.T, args ...string) string {
		return sh(t, "podman", append([]string{"--root", dir + "/root", "--runroot", dir + "/run", "--storage-driver", "overlay"}, args...)...)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir+"/root/overlay", 0) })
	return tool{
		name: "podman",
		pull: func(t *testing.T, ref string) { podman(t, "pull", "-q", "--tls-verify=false", ref) },
		push: func(t *testing.T, ref string) { podman(t, "push", "-q", "--tls-verify=false", ref) },
		load: func(t *testing.T, archive string) { podman(t, "load", "-q", "-i", archive) },
		save: func(t *testing.T, ref, archive string) {
			podman(t, "save", "-q", "--format", "oci-archive", "-o", archive, ref)
		},
		build: func(t *testing.T, dir, ref string) {
			podman(t, "build", "-q", "--isolation", "chroot", "--cap-add", "MKNOD", "--layers", "--tls-verify=false", "-t", ref, dir)
		},
		tree: func(t *testing.T, ref string, fn func(string)) {
			at := strings.TrimSpace(podman(t, "image", "mount", ref))
			defer podman(t, "image", "umount", ref)
			fn(at)
		},
	}
}

func containerd(t *testing.T) tool { return containerdAt(t, t.TempDir()) }

func containerdAt(t *testing.T, dir string) tool {
	testkit.Need(t, "containerd", "containerd")
	sock := dir + "/sock"
	config := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\n[grpc]\n  address = %q\n", dir+"/root", dir+"/state", sock)
	if err := os.WriteFile(dir+"/config.toml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	serve(t, []string{"ctr", "-a", sock, "version"}, "containerd", "-c", dir+"/config.toml", "-l", "error")
	ctr := func(t *testing.T, args ...string) string {
		return sh(t, "ctr", append([]string{"-a", sock}, args...)...)
	}
	return tool{
		name:   "containerd",
		pull:   func(t *testing.T, ref string) { ctr(t, "images", "pull", "--plain-http", ref) },
		push:   func(t *testing.T, ref string) { ctr(t, "images", "push", "--plain-http", ref) },
		load:   func(t *testing.T, archive string) { ctr(t, "images", "import", archive) },
		save:   func(t *testing.T, ref, archive string) { ctr(t, "images", "export", archive, ref) },
		create: func(t *testing.T, ref string) { ctr(t, "containers", "create", ref, "made", "true") },
		tree: func(t *testing.T, ref string, fn func(string)) {
			at := t.TempDir()
			ctr(t, "images", "mount", ref, at)
			defer ctr(t, "images", "unmount", "--rm", at)
			fn(at)
		},
	}
}

// timeOfDir finds the times of directories in [testkit.ListTree].
var timeOfDir = regexp.MustCompile(`^("(?:[^"\\]|\\.)*" mode 4[0-7]{4} owner \S+) mtime \S+`)

// listed describes the tree in dir but for the root directory, which no layer
// lists, and for the times of directories: tools differ in whether a
// directory that a layer only implies, or that it deletes from, keeps its own.
func listed(t *testing.T, dir string) map[string]string {
	t.Helper()
	lines, err := testkit.ListTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, l := range lines[1:] {
		l = timeOfDir.ReplaceAllString(l, "$1")
		name, _, _ := strings.Cut(l, " mode ")
		out[name] = l
	}
	return out
}

// tree shows what varve has under a name. No command may be using the store.
func (h *host) tree(name string, fn func(dir string)) {
	h.t.Helper()
	ref, err := image.ParseRef(name)
	if err != nil {
		h.t.Fatal(err)
	}
	mounted(h.t, h.layers(ref), fn)
}

// layers are the trees of an image, the topmost first.
func (h *host) layers(ref image.Ref) (lowers []string) {
	h.t.Helper()
	o, err := teststore.Open(h.t.Context(), h.root)
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() {
		if err := o.Close(); err != nil {
			h.t.Error(err)
		}
	}()
	err = o.DB.View(h.t.Context(), func(tx *metadata.Tx) error {
		rec, err := tx.Images().Get(ref.String())
		if err != nil {
			return err
		}
		edges, err := unpackedFrom(tx, layout.BlobNode(layout.BlobDigest(rec.Target.Digest)))
		for _, e := range edges {
			_, key := e.Child.Split()
			tree, err := o.Snaps.Tree(h.t.Context(), layout.SnapshotKey(key))
			if err != nil {
				return err
			}
			lowers = tree.Lowers
		}
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return lowers
}

// unpackedFrom looks for the snapshot of a manifest, or of one in an index.
func unpackedFrom(tx *metadata.Tx, blob layout.Node) (out []layout.Edge, err error) {
	edges, err := tx.Children(blob)
	for _, e := range edges {
		if e.Rel == layout.RelUnpacked {
			return []layout.Edge{e}, nil
		}
	}
	for _, e := range edges {
		if kind, _ := e.Child.Split(); kind == layout.KindBlob && len(out) == 0 {
			if out, err = unpackedFrom(tx, e.Child); err != nil {
				return nil, err
			}
		}
	}
	return out, err
}

// compare compares what varve shows in the folder ours with theirs, as look
// sees them.
func compare(t *testing.T, look func(*testing.T, string) map[string]string, ours, theirs string) {
	t.Helper()
	left, right := look(t, ours), look(t, theirs)
	for name, line := range left {
		if right[name] != line {
			t.Errorf("varve  %s%s\n theirs %s%s", line, short(t, ours, name), right[name], short(t, theirs, name))
		}
	}
	for name, line := range right {
		if left[name] == "" {
			t.Errorf("varve has no\n %s%s", line, short(t, theirs, name))
		}
	}
}

// short is what a quoted name's file says, if that is not much.
func short(t *testing.T, dir, quoted string) string {
	name, err := strconv.Unquote(quoted)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if fi, err := os.Lstat(path); err != nil || !fi.Mode().IsRegular() || fi.Size() > 2000 {
		return ""
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return "\n" + string(data)
}

// everything is a Dockerfile whose image has most of what a layer can hold.
const everything = `FROM %s
RUN mkdir -p /deep/er && echo one > /deep/er/file && ln /deep/er/file /deep/hard && ln -s ../etc /deep/soft
RUN mkfifo /pipe && mknod /device c 1 3 && chmod 4755 /pipe && chown 1234:4321 /device
RUN rm -r /deep/er && mkdir /deep/er && echo two > /deep/er/other && rm /deep/hard
RUN rm -r /tmp && echo a file now > /tmp && touch -d '2001-02-03 04:05:06' /tmp
COPY --link --chown=7:8 mine /srv/mine
COPY --chmod=640 mine /private
RUN mkdir /empty && cp -a /deep /copy
USER 7
CMD ["/bin/sh"]
`

// TestClients gives what varve has made to the tools that people use, by a
// registry and as an archive, and takes it back from them: the trees are the
// same. (Not the awkward image: none of Debian's versions can unpack it.)
func TestClients(t *testing.T) {
	registry := testkit.Registry(t)
	base := registry.Push(t, testkit.Busybox(t), "busybox:latest")
	h := newHost(t)
	built := registry.Ref("built:1")
	h.run("build", "-t", built, dockerfile(t, fmt.Sprintf(everything, base), "mine", "mine\n"))
	h.run("push", built)
	archive := filepath.Join(t.TempDir(), "varve.tar")
	h.run("save", "-o", archive, built)
	// same compares what a client has under the name with what varve built.
	same := func(t *testing.T, c tool) {
		t.Helper()
		c.tree(t, built, func(theirs string) {
			h.tree(built, func(ours string) { compare(t, listed, ours, theirs) })
		})
	}
	// again compares what came back to another host.
	again := func(t *testing.T, h2 *host) {
		t.Helper()
		h2.tree(built, func(theirs string) {
			h.tree(built, func(ours string) { compare(t, listed, ours, theirs) })
		})
	}
	for _, start := range []func(*testing.T) tool{docker, podman, containerd} {
		c := start(t)
		t.Run(c.name+" pulls what varve pushed", func(t *testing.T) {
			c.pull(t, built)
			same(t, c)
		})
		t.Run("varve pulls what "+c.name+" pushed", func(t *testing.T) {
			c.push(t, built)
			h2 := newHost(t)
			h2.run("pull", built)
			again(t, h2)
			if out, code := h2.try("run", "--rm", built, "cat", "/srv/mine"); code != 0 || out != "mine\n" {
				t.Errorf("run: code %d, %q", code, out)
			}
		})
		t.Run("varve loads what "+c.name+" saved", func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "theirs.tar")
			c.save(t, built, file)
			h2 := newHost(t)
			h2.run("load", "-i", file)
			again(t, h2)
		})
	}
	for _, start := range []func(*testing.T) tool{docker, podman} {
		c := start(t)
		t.Run("varve pulls what "+c.name+" built", func(t *testing.T) {
			theirs := registry.Ref("by-" + c.name + ":1")
			c.build(t, dockerfile(t, fmt.Sprintf(strings.NewReplacer("--link", "", "--chmod=640", "").Replace(everything), base), "mine", "mine\n"), theirs)
			c.push(t, theirs)
			h2 := newHost(t)
			h2.run("pull", theirs)
			h2.tree(theirs, func(ours string) {
				c.tree(t, theirs, func(theirs string) { compare(t, listed, ours, theirs) })
			})
		})
	}
	for _, start := range []func(*testing.T) tool{docker, podman, containerd} {
		c := start(t) // an empty one
		t.Run(c.name+" loads what varve saved", func(t *testing.T) {
			c.load(t, archive)
			same(t, c)
		})
	}
}
