//go:build peers

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"varve.dev/internal/testkit"
)

// buildkit starts BuildKit at the version whose frontend varve has, on runc,
// and returns how to build with it.
func buildkit(t *testing.T, registry *testkit.RegistryServer) func(dir, archive string, args []string) (string, error) {
	testkit.Need(t, "runc", "runc")
	out, err := exec.Command("../../scripts/peer", "buildkit").Output()
	if err != nil {
		t.Fatal(err)
	}
	bin := strings.TrimSpace(string(out))
	dir := t.TempDir()
	config := fmt.Sprintf("root = %q\n[registry.%q]\n  http = true\n[worker.containerd]\n  enabled = false\n"+
		"[worker.oci]\n  snapshotter = \"overlayfs\"\n  binary = \"runc\"\n  networkMode = \"host\"\n", dir+"/root", registry.Addr)
	if err := os.WriteFile(dir+"/config.toml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	addr := "unix://" + dir + "/sock"
	serve(t, []string{bin + "/buildctl", "--addr", addr, "debug", "workers"}, bin+"/buildkitd", "--config", dir+"/config.toml", "--addr", addr)
	return func(dir, archive string, args []string) (string, error) {
		args = append([]string{"--addr", addr, "build", "--progress=plain", "--frontend=dockerfile.v0", "--local=context=" + dir, "--local=dockerfile=" + dir,
			"--output=type=oci,name=theirs:latest,dest=" + archive}, args...)
		out, err := exec.Command(bin+"/buildctl", args...).CombinedOutput()
		return string(out), err
	}
}

// recently matches the times of what was made in a test.
var recently = regexp.MustCompile(` mtime (\d+)\.\d+`)

// timeless is [listed] without the times that no two builds have in common.
func timeless(t *testing.T, dir string) map[string]string {
	t.Helper()
	tree := listed(t, dir)
	for name, line := range tree {
		tree[name] = recently.ReplaceAllStringFunc(line, func(s string) string {
			if sec, _ := strconv.ParseInt(recently.FindStringSubmatch(s)[1], 10, 64); sec > 1_700_000_000 {
				return ""
			}
			return s
		})
	}
	return tree
}

// peerCase is one build. In Dockerfiles, BASE is the busybox image.
type peerCase struct {
	name       string
	dockerfile string
	files      []string // name, contents, …
	args       []string // of varve build; BuildKit's are made of them
	refused    bool     // by both
	stricter   bool     // refused by varve, with a reason, where BuildKit makes something else of it
}

func TestPeers(t *testing.T) {
	registry := testkit.Registry(t)
	base := registry.Push(t, testkit.Busybox(t), "busybox:latest")
	build := buildkit(t, registry)
	h := newHost(t)
	for _, c := range peerCases(t) {
		t.Run(c.name, func(t *testing.T) {
			h.t = t
			dir := dockerfile(t, strings.ReplaceAll(c.dockerfile, "BASE", base), c.files...)
			dressContext(t, dir)
			archive := filepath.Join(t.TempDir(), "theirs.tar")
			theirText, theirErr := build(dir, archive, buildkitArgs(c.args))
			ourText, code := h.try(append(append([]string{"build", "-t", "ours"}, c.args...), dir)...)
			if (code != 0) != (c.refused || c.stricter) || (theirErr != nil) != c.refused {
				t.Errorf("varve ends with %d, BuildKit with %v\n%s\n%s", code, theirErr, ourText, theirText)
			}
			if code != 0 || theirErr != nil {
				return
			}
			h.run("load", "-q", "-i", archive)
			h.tree("ours", func(ours string) {
				h.tree("theirs", func(theirs string) { compare(t, timeless, ours, theirs) })
			})
			compareConfigs(t, h, "ours", "theirs")
		})
	}
}

// dressContext gives the context's files what a checkout could have.
func dressContext(t *testing.T, dir string) {
	t.Helper()
	then := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if strings.HasSuffix(p, ".sh") {
			if err := os.Chmod(p, 0o755); err != nil {
				return err
			}
		}
		if target, ok := strings.CutSuffix(p, ".link"); ok {
			// A link to what the file says.
			to, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			if err := os.Remove(p); err != nil {
				return err
			}
			return os.Symlink(strings.TrimSpace(string(to)), target)
		}
		return os.Chtimes(p, then, then)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func buildkitArgs(args []string) (out []string) {
	for i := 0; i+1 < len(args); i += 2 {
		switch args[i] {
		case "--build-arg":
			out = append(out, "--opt=build-arg:"+args[i+1])
		case "--label":
			out = append(out, "--opt=label:"+args[i+1])
		case "--target":
			out = append(out, "--opt=target="+args[i+1])
		case "--add-host":
			name, ip, _ := strings.Cut(args[i+1], ":")
			out = append(out, "--opt=add-hosts="+name+"="+ip)
		}
	}
	return out
}

// compareConfigs compares everything in the images' configs but times and
// digests, of which the number counts.
func compareConfigs(t *testing.T, h *host, ours, theirs string) {
	t.Helper()
	var configs [2]map[string]any
	for i, name := range []string{ours, theirs} {
		archive := filepath.Join(t.TempDir(), "image.tar")
		h.run("save", "-o", archive, name)
		configs[i] = configIn(t, archive)
		delete(configs[i], "created")
		rootfs, _ := configs[i]["rootfs"].(map[string]any)
		diffs, _ := rootfs["diff_ids"].([]any)
		rootfs["diff_ids"] = len(diffs)
		history, _ := configs[i]["history"].([]any)
		for _, e := range history {
			delete(e.(map[string]any), "created")
		}
	}
	for _, key := range slices.Sorted(keysOf(configs[0], configs[1])) {
		if !reflect.DeepEqual(configs[0][key], configs[1][key]) {
			a, _ := json.MarshalIndent(configs[0][key], "", " ")
			b, _ := json.MarshalIndent(configs[1][key], "", " ")
			t.Errorf("config, %s:\n varve %s\n BuildKit %s", key, a, b)
		}
	}
}

func keysOf(maps ...map[string]any) func(func(string) bool) {
	return func(yield func(string) bool) {
		seen := map[string]bool{}
		for _, m := range maps {
			for k := range m {
				if !seen[k] && !yield(k) {
					return
				}
				seen[k] = true
			}
		}
	}
}

// configIn reads the config of the one image in a docker archive.
func configIn(t *testing.T, archive string) map[string]any {
	t.Helper()
	read := func(name string, v any) {
		f, err := os.Open(archive)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for r := tar.NewReader(f); ; {
			hdr, err := r.Next()
			if err != nil {
				t.Fatalf("%s: %s: %v", archive, name, err)
			}
			if hdr.Name == name {
				if err := json.NewDecoder(r).Decode(v); err != nil {
					t.Fatal(err)
				}
				return
			}
		}
	}
	var manifest []struct{ Config string }
	read("manifest.json", &manifest)
	config := map[string]any{}
	read(manifest[0].Config, &config)
	return config
}

// archiveOf is a compressed tar of files, each with an owner and a time.
func archiveOf(t *testing.T, names ...string) string {
	t.Helper()
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	w := tar.NewWriter(z)
	for _, n := range names {
		h := &tar.Header{Name: n, Mode: 0o640, Uid: 11, Gid: 12, ModTime: time.Unix(1_000_000_000, 0), Typeflag: tar.TypeReg, Size: int64(len(n))}
		if strings.HasSuffix(n, "/") {
			h.Typeflag, h.Size, h.Mode = tar.TypeDir, 0, 0o750
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write([]byte(n)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.String()
}
