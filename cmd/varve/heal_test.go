package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"varve.dev/layout"
)

// healed is how long a daemon may take to be itself again.
const healed = 10 * time.Second

// A daemon whose database is damaged under it makes the database anew and
// serves on: commands wait or are repeated, a container does not notice, a
// build that is cut off is built again, and nothing is lost.
func TestDaemonHeals(t *testing.T) {
	for what, damage := range map[string]func(file []byte, name string) (pages []int){
		"the pages that tell of an image": pagesWith,
		"the newest meta page":            newestMetaPage,
	} {
		t.Run(what, func(t *testing.T) {
			h := newHost(t)
			name, mark := busybox(t), marker()
			server, log := h.begin("serving", "daemon")
			h.run("pull", name)
			shared := t.TempDir()
			container, printed := h.begin("up\n", "run", "--rm", "-v", shared+":/shared", name,
				"sh", "-c", "echo up; until test -e /shared/stop; do sleep 0.05; done; echo ends; exit 9")
			build, steps := h.begin("begun\n", "build", "-t", "built", dockerfile(t, fmt.Sprintf(
				"FROM %s\nRUN --mount=type=cache,target=/c echo begun; test -e /c/second || { touch /c/second; sleep %s; }; echo ended\n", name, mark)))

			zeroPages(t, filepath.Join(h.root, layout.DatabaseFile), name, damage)
			began := time.Now()
			out, code := h.try("images")
			if took := time.Since(began); code != 0 || !strings.Contains(out, name) || took > healed {
				t.Errorf("images: exit code %d after %v\n%s", code, took, out)
			}
			if out := h.run("info"); !strings.Contains(out, "the database was rebuilt on") || strings.Contains(out, "lost: ") {
				t.Errorf("info:\n%s", out)
			}
			if err := build.Wait(); err != nil {
				t.Errorf("the build: %v\n%s", err, steps)
			}
			h.run("run", "--rm", "built", "true")
			if err := os.WriteFile(filepath.Join(shared, "stop"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			if _ = container.Wait(); container.ProcessState.ExitCode() != 9 || printed.String() != "up\nends\n" {
				t.Errorf("the container: exit code %d, output %q", container.ProcessState.ExitCode(), printed)
			}
			if err := server.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := server.Wait(); err != nil || !strings.Contains(log.String(), "is open again") {
				t.Errorf("the daemon: %v\n%s", err, log)
			}
			if n := running(t, mark); n > 0 {
				t.Errorf("%d processes of the first build are left", n)
			}
		})
	}
}

// zeroPages makes pages of a database zeros, whoever has it mapped.
func zeroPages(t *testing.T, path, name string, choose func(file []byte, name string) []int) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	pages := choose(data, name)
	if len(pages) == 0 {
		t.Fatal("no page to damage")
	}
	for _, p := range pages {
		if _, err := f.WriteAt(make([]byte, 4096), int64(p)*4096); err != nil {
			t.Fatal(err)
		}
	}
}

func pagesWith(file []byte, name string) (pages []int) {
	for p := 2; p < len(file)/4096; p++ {
		if bytes.Contains(file[p*4096:(p+1)*4096], []byte(name)) {
			pages = append(pages, p)
		}
	}
	return pages
}

// newestMetaPage is the one with the higher number of a commit (bbolt's
// internal/common/meta.go).
func newestMetaPage(file []byte, _ string) []int {
	commit := func(page int) uint64 { return binary.NativeEndian.Uint64(file[page*4096+16+48:]) }
	if commit(1) > commit(0) {
		return []int{1}
	}
	return []int{0}
}
