//go:build peers

package crashtest

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"varve.dev/fsck/foreign"
	"varve.dev/internal/powercut"
	"varve.dev/internal/testkit"
)

// peer is an engine of Debian's under the instrument.
type peer struct {
	name    string
	daemon  func(dir, state string) *exec.Cmd
	client  func(state string, args ...string) *exec.Cmd
	ready   []string // asks the client whether the daemon answers
	pull    func(image string) []string
	list    []string
	version []string
	layers  string // where the trees of its layers are
	engine  foreign.Engine
	root    string // what fsck is to be told
}

var peers = []peer{
	{
		name: "containerd",
		daemon: func(dir, state string) *exec.Cmd {
			config := filepath.Join(state, "containerd.toml")
			text := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\n[grpc]\n  address = %q\n", filepath.Join(dir, "containerd"), filepath.Join(state, "containerd"), filepath.Join(state, "sock"))
			_ = os.WriteFile(config, []byte(text), 0o600)
			return exec.Command("containerd", "-c", config, "-l", "error")
		},
		client: func(state string, args ...string) *exec.Cmd {
			return exec.Command("ctr", append([]string{"-a", filepath.Join(state, "sock")}, args...)...)
		},
		ready:   []string{"version"},
		pull:    func(image string) []string { return []string{"images", "pull", "--plain-http", image} },
		list:    []string{"images", "ls", "-q"},
		version: []string{"--version"},
		layers:  "containerd/io.containerd.snapshotter.v1.overlayfs/snapshots",
		engine:  foreign.Containerd,
		root:    "containerd",
	},
	{
		name: "dockerd",
		daemon: func(dir, state string) *exec.Cmd {
			return exec.Command("dockerd", "--data-root", filepath.Join(dir, "docker"), "--exec-root", filepath.Join(state, "docker"),
				"--pidfile", filepath.Join(state, "pid"), "-H", "unix://"+filepath.Join(state, "sock"),
				"--storage-driver", "overlay2", "--bridge", "none", "--iptables=false", "--ip6tables=false", "-l", "error")
		},
		client: func(state string, args ...string) *exec.Cmd {
			return exec.Command("docker", append([]string{"-H", "unix://" + filepath.Join(state, "sock")}, args...)...)
		},
		ready:   []string{"version"},
		pull:    func(image string) []string { return []string{"pull", "-q", image} },
		list:    []string{"images", "--format", "{{.Repository}}:{{.Tag}}"},
		version: []string{"version", "--format", "{{.Server.Version}}"},
		layers:  "docker/overlay2",
		engine:  foreign.Docker,
		root:    "docker",
	},
}

func init() {
	for _, p := range peers {
		roles[p.name+" pulls"] = func(dir string, args []string, mark func(string, ...any)) error {
			return p.with(dir, args[0], func() error {
				version, err := p.ask(args[0], p.version...)
				if err != nil {
					return err
				}
				mark(fact+"version %s", strings.Join(strings.Fields(version), " "))
				mark("opened")
				if _, err := p.ask(args[0], p.pull(args[1]+"/"+debianName)...); err != nil {
					return err
				}
				mark("acknowledged")
				return nil
			})
		}
		roles[p.name+" lists"] = func(dir string, args []string, mark func(string, ...any)) error {
			return p.with(dir, args[0], func() error {
				out, err := p.ask(args[0], p.list...)
				for name := range strings.FieldsSeq(out) {
					mark("image %s", name)
				}
				return err
			})
		}
		// In a process of its own: the one that serves the disk must not map
		// the database that is on it.
		roles[p.name+" is checked"] = func(dir string, _ []string, mark func(string, ...any)) error {
			report, err := foreign.Run(context.Background(), foreign.Options{Engine: p.engine, Root: filepath.Join(dir, p.root)})
			if err != nil {
				return err
			}
			for _, f := range report.Findings {
				if f.Kind == foreign.Empty || f.Kind == foreign.Extra {
					mark("%s %s", f.Kind, filepath.Join(p.root, f.Path))
				}
			}
			for _, kind := range slices.Sorted(maps.Keys(report.Counts)) {
				mark("count %d %s", report.Counts[kind], kind)
			}
			mark("code %d", report.ExitCode())
			return nil
		}
	}
}

// with runs the daemon on dir while fn runs. It ends like the power: at once,
// with all that it has started.
func (p peer) with(dir, state string, fn func() error) error {
	daemon := p.daemon(dir, state)
	daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := daemon.Start(); err != nil {
		return err
	}
	defer func() {
		_ = syscall.Kill(-daemon.Process.Pid, syscall.SIGKILL)
		_ = daemon.Wait()
	}()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if _, err := p.ask(state, p.ready...); err == nil {
			return fn()
		} else if time.Now().After(deadline) {
			return err
		}
	}
}

func (p peer) ask(state string, args ...string) (string, error) {
	out, err := p.client(state, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", p.name, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// debianName is a real image: Debian's containerd cannot unpack the stacked
// one, which links into lower layers.
const debianName = "debian:1"

var peersTable = table{"peers", row{"engine", "file system", "after a pull that was acknowledged", "`varve fsck --of-…` names", "when it is started again"}}

// TestPeersUnderTheRig pulls an image by other engines and cuts the power when
// they have said that it is done: the instrument that finds nothing with varve
// finds what there is to find.
func TestPeersUnderTheRig(t *testing.T) {
	at := newPlace(t, 1, 1)
	at.registry.Push(t, testkit.Debian(t), debianName)
	for _, p := range peers {
		testkit.Need(t, p.name, map[string]string{"containerd": "containerd", "dockerd": "docker.io"}[p.name])
		for _, kind := range kinds(t) {
			t.Run(p.name+" on "+string(kind), func(t *testing.T) { p.cutPower(t, at, kind) })
		}
	}
}

func (p peer) cutPower(t *testing.T, at place, kind powercut.FileSystem) {
	rig := newRig(t)
	state := t.TempDir()
	rec, facts := record(t, rig, kind, 4<<30, at.worker(p.name+" pulls"), state, at.remote)
	m, err := rig.Mount(kind, rec.Replay().Image(powercut.Cut{At: rec.Find("acknowledged"), Tail: powercut.None}))
	must(t, err)
	files, empty := emptyFiles(t, m.Dir, p.layers)
	lost := fmt.Sprintf("%d files, %d of them empty", files, len(empty))
	some := len(empty) > 0
	named, verdict := p.check(t, at, m.Dir, empty)
	compareEmpty(t, empty, named, mustBeEmpty(t, testkit.Debian(t)))
	listed := 0
	w := at.worker(p.name + " lists")
	w.Mark = func(string) { listed++ }
	lerr := w.Run(m.Dir, t.TempDir(), at.remote)
	must(t, unmountAll(m))
	after := fmt.Sprintf("lists %d images", listed)
	if lerr != nil {
		after = "does not answer"
		t.Log(lerr)
	}
	version := strings.Fields(facts[0])
	tell(t, peersTable, row{p.name + " " + version[len(version)-1], string(kind), lost, verdict, after})
	if !some && files > 1000 {
		t.Error("it lost nothing")
	}
}

// unmountAll unmounts a disk and what an engine has mounted below it.
func unmountAll(m *powercut.Mount) error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if at := strings.Fields(line)[1]; strings.HasPrefix(at, m.Dir+"/") {
			err = errors.Join(err, syscall.Unmount(at, syscall.MNT_DETACH))
		}
	}
	return errors.Join(err, m.Unmount())
}

// check has the store looked at by varve fsck. What lies in trees whose record
// is lost, and which are named as a whole, is taken from the empty files.
func (p peer) check(t *testing.T, at place, dir string, empty map[string]bool) (named map[string]bool, verdict string) {
	t.Helper()
	named = map[string]bool{}
	var counts []string
	w := at.worker(p.name + " is checked")
	w.Mark = func(line string) {
		what, rest, _ := strings.Cut(line, " ")
		switch what {
		case "empty":
			named[rest] = true
		case "extra":
			maps.DeleteFunc(empty, func(name string, _ bool) bool { return strings.HasPrefix(name, rest+"/") })
		case "count":
			counts = append(counts, rest)
		case "code":
			verdict = "exit code " + rest
		}
	}
	if err := w.Run(dir); err != nil {
		t.Error(err) // the disk has to be unmounted all the same
	}
	return named, strings.Join(append(counts, verdict), ", ")
}

// compareEmpty compares the empty files with those that fsck names: all, but
// for those that the image has empty.
func compareEmpty(t *testing.T, empty, named, rightly map[string]bool) {
	t.Helper()
	isRight := func(name string) bool {
		for _, tree := range []string{"/diff/", "/fs/"} {
			if _, file, ok := strings.Cut(name, tree); ok {
				return rightly[file]
			}
		}
		return false
	}
	for name := range empty {
		if named[name] == isRight(name) {
			t.Errorf("%s is empty, must be so: %v, fsck names it: %v", name, isRight(name), named[name])
		}
	}
	for name := range named {
		if (strings.Contains(name, "/diff/") || strings.Contains(name, "/fs/")) && !empty[name] {
			t.Errorf("fsck says that %s is empty", name)
		}
	}
}

// emptyFiles counts the regular files of layers, and names the empty ones.
func emptyFiles(t *testing.T, root, layers string) (files int, empty map[string]bool) {
	empty = map[string]bool{}
	err := filepath.WalkDir(filepath.Join(root, layers), func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fi, err := d.Info()
		files++
		if err == nil && fi.Size() == 0 {
			name, err = filepath.Rel(root, name)
			empty[name] = true
		}
		return err
	})
	if err != nil && !os.IsNotExist(err) {
		t.Error(err)
	}
	return files, empty
}

// mustBeEmpty are the names in an image of one layer that have no bytes.
func mustBeEmpty(t *testing.T, img testkit.Image) map[string]bool {
	t.Helper()
	m, _ := testkit.ReadImage(t, img)
	f, err := os.Open(testkit.BlobPath(img.Dir, m.Layers[0].Digest))
	must(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	must(t, err)
	empty := map[string]bool{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return empty
		}
		must(t, err)
		if name := filepath.Clean(h.Name); h.Typeflag == tar.TypeReg && h.Size == 0 || h.Typeflag == tar.TypeLink && empty[filepath.Clean(h.Linkname)] {
			empty[name] = true
		}
	}
}
