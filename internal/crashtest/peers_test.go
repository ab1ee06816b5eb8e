//go:build peers

package crashtest

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"varve.dev/internal/powercut"
	"varve.dev/internal/testkit"
)

func init() {
	roles["containerd"] = containerdPulls
	roles["containerd again"] = containerdLists
}

// withContainerd runs Debian's containerd on dir and hands fn its client. It
// ends like the power: at once.
func withContainerd(dir, state string, fn func(ctr func(args ...string) (string, error)) error) error {
	config := filepath.Join(state, "containerd.toml")
	sock := filepath.Join(state, "containerd.sock")
	text := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\n[grpc]\n  address = %q\n", filepath.Join(dir, "containerd"), filepath.Join(state, "containerd"), sock)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	daemon := exec.Command("containerd", "-c", config, "-l", "error")
	if err := daemon.Start(); err != nil {
		return err
	}
	defer func() {
		_ = daemon.Process.Kill()
		_ = daemon.Wait()
	}()
	ctr := func(args ...string) (string, error) {
		out, err := exec.Command("ctr", append([]string{"-a", sock}, args...)...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, out)
		}
		return string(out), err
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if _, err := ctr("version"); err == nil {
			return fn(ctr)
		} else if time.Now().After(deadline) {
			return err
		}
	}
}

func containerdPulls(dir string, args []string, mark func(string, ...any)) error {
	return withContainerd(dir, args[0], func(ctr func(...string) (string, error)) error {
		mark("opened")
		if _, err := ctr("images", "pull", "--plain-http", args[1]+"/"+debianName); err != nil {
			return err
		}
		mark("acknowledged")
		return nil
	})
}

func containerdLists(dir string, args []string, mark func(string, ...any)) error {
	return withContainerd(dir, args[0], func(ctr func(...string) (string, error)) error {
		out, err := ctr("images", "ls", "-q")
		for name := range strings.FieldsSeq(out) {
			mark("image %s", name)
		}
		return err
	})
}

// debianName is a real image: Debian's containerd cannot unpack the stacked
// one, which links into lower layers.
const debianName = "debian:1"

// TestPeersUnderTheRig pulls an image by containerd and cuts the
// power when it has said that it is done: the instrument that finds nothing
// with varve finds what there is to find.
func TestPeersUnderTheRig(t *testing.T) {
	testkit.Need(t, "containerd", "containerd")
	at := newPlace(t, stackedLayers, 150)
	at.registry.Push(t, testkit.Debian(t), debianName)
	for _, kind := range kinds(t) {
		t.Run(string(kind), func(t *testing.T) {
			rig := newRig(t)
			state := t.TempDir()
			rec, _ := record(t, rig, kind, at.worker("containerd"), state, at.remote)
			m, err := rig.Mount(kind, rec.Replay().Image(powercut.Cut{At: rec.Find("acknowledged"), Tail: powercut.None}))
			if err != nil {
				t.Fatal(err)
			}
			files, empty := 0, 0
			snapshots := filepath.Join(m.Dir, "containerd", "io.containerd.snapshotter.v1.overlayfs", "snapshots")
			err = filepath.WalkDir(snapshots, func(_ string, d fs.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() {
					return err
				}
				fi, err := d.Info()
				files++
				if err == nil && fi.Size() == 0 {
					empty++
				}
				return err
			})
			if err != nil && !os.IsNotExist(err) {
				t.Error(err)
			}
			var listed []string
			w := at.worker("containerd again")
			w.Mark = func(line string) { listed = append(listed, line) }
			lerr := w.Run(m.Dir, state, at.remote)
			if err := m.Unmount(); err != nil {
				t.Fatal(err)
			}
			t.Logf("after an acknowledged pull: %d files, %d of them empty; listed: %q (%v)", files, empty, listed, lerr)
			if empty == 0 && files > 1000 {
				t.Error("containerd lost nothing")
			}
		})
	}
}
