package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"varve.dev/api/varve"
)

func (h *host) usage() (u varve.DiskUsage) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.run("df", "--json", "-v")), &u); err != nil {
		h.t.Fatal(err)
	}
	return u
}

// df tells of everything, one by one too; each prune removes its own and nothing
// that is used.
func TestPruneAndDf(t *testing.T) {
	h := newHost(t)
	base := busybox(t)
	h.run("build", "-t", "app:1", dockerfile(t, "FROM "+base+"\nLABEL purpose=test\nRUN --mount=type=cache,target=/c head -c 100000 /dev/urandom > /c/x && head -c 200000 /dev/urandom > /y\n"))
	h.run("run", "--name", "done", "app:1", "sh", "-c", "head -c 300000 /dev/urandom > /z")
	u := h.usage()
	// The results are a step's, and what the builder was sent: the Dockerfile,
	// and that there is no .dockerignore.
	if len(u.EachImage) != 2 || len(u.EachContainer) != 1 || len(u.EachMount) != 1 || len(u.EachResult) != 3 {
		t.Fatalf("%+v", u)
	}
	if c := u.EachContainer[0]; c.Name != "done" || c.Bytes < 300000 || c.Bytes > 400000 || time.Since(c.When) > time.Minute {
		t.Errorf("the container: %+v", c)
	}
	for _, i := range u.EachImage {
		app := i.Names[0] == "app:1"
		if app && (i.InUse != 1 || i.Unique < 200000) || !app && i.InUse != 0 || i.Unique+i.Shared != i.Bytes || i.Shared == 0 {
			t.Errorf("%+v", i)
		}
	}
	if out := h.run("df"); !strings.Contains(out, "Cache mounts        1") || !strings.Contains(out, "Total") {
		t.Errorf("df:\n%s", out)
	}

	// Nothing goes that is in use, or that is not asked for.
	if out := h.run("image", "prune", "-a", "-f", "--filter", "label=purpose=other"); strings.Contains(out, "Untagged") {
		t.Errorf("pruned by another label:\n%s", out)
	}
	if out := h.run("image", "prune", "-a", "-f"); !strings.Contains(out, "Untagged: "+strings.TrimSuffix(base, ":latest")+"@sha256:") || strings.Contains(out, "app:1") {
		t.Errorf("image prune:\n%s", out)
	}
	if out := h.run("container", "prune", "-f", "--filter", "until=1h"); strings.Contains(out, "Removed") {
		t.Errorf("a container that is younger:\n%s", out)
	}
	before := h.usage()
	out := h.run("container", "prune", "-f", "--filter", "label=purpose")
	if !strings.Contains(out, "Removed container: "+u.EachContainer[0].ID) {
		t.Errorf("container prune:\n%s", out)
	}
	if after := h.usage(); after.Containers.Count != 0 || before.Total-after.Total < 300000 {
		t.Errorf("%d bytes before, %d after the container went", before.Total, after.Total)
	}
	if out := h.run("builder", "prune", "-f", "--keep-storage", "1GB"); !strings.Contains(out, "reclaimed space: 0B") {
		t.Errorf("builder prune --keep-storage:\n%s", out)
	}
	if out := h.run("system", "prune", "-a", "-f"); !strings.Contains(out, "Untagged: app:1") || !strings.Contains(out, "3 results, 1 cache mounts") {
		t.Errorf("system prune:\n%s", out)
	}
	if u := h.usage(); u.Images.Bytes != 0 || u.Cache.Bytes != 0 || u.CacheMounts.Bytes != 0 || u.Trash.Count != 0 {
		t.Errorf("after everything was pruned: %+v", u)
	}

	for text, args := range map[string][]string{
		`filter "size=1"`:    {"image", "prune", "-f", "--filter", "size=1"},
		"neither a duration": {"container", "prune", "-f", "--filter", "until=soon"},
		"have no labels":     {"builder", "prune", "-f", "--filter", "label=x"},
		"--keep-storage":     {"builder", "prune", "-f", "--keep-storage", "much"},
	} {
		if out, code := h.try(args...); code != 1 || !strings.Contains(out, text) {
			t.Errorf("%v: exit code %d, %q", args, code, out)
		}
	}
	// Without -f it asks, and nobody says yes.
	if out := h.run("system", "prune"); !strings.Contains(out, "[y/N]") || strings.Contains(out, "reclaimed") {
		t.Errorf("unasked:\n%s", out)
	}
}

// Limits come from the configuration file, and from flags for once.
func TestLimitsOfAStore(t *testing.T) {
	h := newHost(t)
	base := busybox(t)
	big := dockerfile(t, "FROM "+base+"\nRUN head -c 20000000 /dev/urandom > /y\n")
	config := filepath.Join(t.TempDir(), "config.toml")
	write := func(text string) {
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("[gc]\nsize = \"16MB\"\n")
	if out, code := h.try("--config", config, "build", "-t", "big", big); code != 1 || !strings.Contains(out, "its limit is 16MB") || !strings.Contains(out, "Dockerfile:2") {
		t.Errorf("20 MB in a store of 16: exit code %d\n%s", code, out)
	}
	if u := h.usage(); u.Total > 16_000_000 {
		t.Errorf("a step that did not fit left %d bytes", u.Total)
	}
	h.run("build", "-t", "big", big)
	h.run("rmi", "big")
	if u := h.usage(); u.Cache.Bytes < 20_000_000 {
		t.Errorf("the build cache: %+v", u.Cache)
	}
	if out := h.run("gc", "--cache", "1MB"); !strings.Contains(out, "less than before") {
		t.Errorf("gc:\n%s", out)
	}
	if u := h.usage(); u.Cache.Bytes > 1_000_000 || u.Trash.Count != 0 {
		t.Errorf("after gc --cache 1MB: %+v, %+v", u.Cache, u.Trash)
	}
	for text, wrong := range map[string]string{
		"gc.size":   "[gc]\nsize = \"many\"\n",
		"retain":    "[gc]\nretain = \"some\"\n",
		"cache_age": "[gc]\ncache_age = \"1 week\"\n",
		"pins":      "[gc]\npins = [\"[\"]\n",
		"images":    "[gc]\nimages = \"burn\"\n",
	} {
		write(wrong)
		if out, code := h.try("--config", config, "df"); code != 1 || !strings.Contains(out, text) {
			t.Errorf("%q: exit code %d, %q", wrong, code, out)
		}
	}
}
