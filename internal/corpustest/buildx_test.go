package corpustest

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// buildxHome is a buildx that knows one builder: the daemon, by its address.
type buildxHome struct {
	bin string
	env []string
}

func newBuildx(t *testing.T, addr string) buildxHome {
	t.Helper()
	b := buildxHome{filepath.Join(peer(t, "buildx"), "buildx"), append(os.Environ(), "BUILDX_CONFIG="+t.TempDir(), "DOCKER_CONFIG="+t.TempDir(), "DOCKER_HOST=unix:///nowhere")}
	b.run(t, "create", "--name", "varve", "--driver", "remote", "--use", addr)
	return b
}

func (b buildxHome) command(args ...string) *exec.Cmd {
	cmd := exec.Command(b.bin, args...)
	cmd.Env = b.env
	return cmd
}

// run runs buildx, which has to succeed, and returns what it printed.
func (b buildxHome) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := b.command(args...).CombinedOutput()
	if err != nil {
		t.Fatalf("buildx %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// folder makes a build context of names and contents.
func folder(t *testing.T, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i := 0; i < len(files); i += 2 {
		write(t, filepath.Join(dir, files[i]), files[i+1])
	}
	return dir
}

// says fails the test unless text has all of what.
func says(t *testing.T, text string, what ...string) {
	t.Helper()
	for _, w := range what {
		if !strings.Contains(text, w) {
			t.Errorf("%q is not in:\n%s", w, text)
		}
	}
}

var cachedStep = regexp.MustCompile(`\[(tools|app) \d/\d\] .*\n#\d+ CACHED\n`)

// TestBuildx uses what buildx has beside building into a file. The steps go on
// from each other.
func TestBuildx(t *testing.T) {
	w := newWorld(t)
	b := newBuildx(t, w.startVarve(t))
	app := w.registry.Ref("app:1")
	dir := folder(t, "f", "f\n", "Dockerfile", "# check=skip=FromAsCasing\nFROM "+w.base+" AS tools\nARG WHO=nobody\nRUN echo $WHO > /who\n"+
		"FROM "+w.base+" AS app\nCOPY f /f\nCOPY --from=tools /who /who\nCMD cat /f\n")
	t.Run("inspect", func(t *testing.T) {
		says(t, b.run(t, "inspect", "--bootstrap"), "Driver: ", "remote", "Status: ", "running", "linux/amd64")
	})
	t.Run("push", func(t *testing.T) {
		meta, id := filepath.Join(dest(t), "meta"), filepath.Join(t.TempDir(), "id")
		if err := os.Mkdir(filepath.Dir(meta), 0o755); err != nil {
			t.Fatal(err)
		}
		b.run(t, "build", "--push", "-t", app, "--metadata-file", meta, "--iidfile", id, "--build-arg", "WHO=me", dir)
		var m map[string]any
		if err := json.Unmarshal(readFile(t, meta), &m); err != nil {
			t.Fatal(err)
		}
		if d := string(readFile(t, id)); m["image.name"] != app || m["containerimage.digest"] != d || m["buildx.build.provenance"] == nil {
			t.Errorf("image %s, metadata %v", d, m)
		}
		// Both the image and the provenance that buildx asks for.
		says(t, b.run(t, "imagetools", "inspect", app), string(readFile(t, id)), "linux/amd64", "attestation-manifest")
		says(t, b.run(t, "imagetools", "inspect", "--format", "{{json .Provenance}}", app), "dockerfile.v0", "pkg:docker/"+w.registry.Addr+"/busybox@latest")
		b.run(t, "imagetools", "create", "-t", w.registry.Ref("app:2"), app)
		says(t, b.run(t, "imagetools", "inspect", w.registry.Ref("app:2")), string(readFile(t, id)))
	})
	t.Run("platforms", func(t *testing.T) {
		ref := w.registry.Ref("many:1")
		dir := folder(t, "Dockerfile", "FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /\n", "amd64", "1", "arm64", "2")
		b.run(t, "build", "--platform", "linux/amd64,linux/arm64", "--provenance=false", "-o", "type=registry,name="+ref, dir)
		says(t, b.run(t, "imagetools", "inspect", ref), "linux/amd64", "linux/arm64")
	})
	t.Run("bake", func(t *testing.T) {
		out := dest(t)
		write(t, filepath.Join(dir, "docker-bake.hcl"), `
variable "WHO" { default = "baker" }
group "default" { targets = ["one", "both"] }
target "one" {
  target = "tools"
  args = { WHO = WHO }
  output = ["type=local,dest=`+out+`/one"]
}
target "both" {
  name = "both-${n}"
  matrix = { n = ["a", "b"] }
  dockerfile-inline = "FROM scratch\nCOPY --from=one /who /\nCOPY f /${n}\n"
  contexts = { one = "target:one" }
  output = ["type=local,dest=`+out+`/${n}"]
}
`)
		cmd := b.command("bake", "--allow=fs.write="+filepath.Dir(out))
		cmd.Dir = dir
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		for name, want := range map[string]string{"one/who": "baker\n", "a/who": "baker\n", "a/a": "f\n", "b/b": "f\n"} {
			if got := string(readFile(t, filepath.Join(out, name))); got != want {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
	})
	t.Run("call", func(t *testing.T) {
		says(t, b.run(t, "build", "--call=outline", "--target=tools", dir), "WHO", "nobody")
		says(t, b.run(t, "build", "--call=targets", dir), "tools", "app", "(default)")
		text, err := b.command("build", "--check", dir).CombinedOutput()
		if err == nil { // it fails where there is something to say
			t.Error("nothing was found")
		}
		says(t, string(text), "JSONArgsRecommended", "CMD cat /f")
	})
	t.Run("from standard input", func(t *testing.T) {
		out := dest(t)
		cmd := b.command("build", "-f", "-", "-o", out, dir)
		cmd.Stdin = strings.NewReader("FROM scratch\nCOPY f /of-stdin\n")
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		says(t, string(readFile(t, filepath.Join(out, "of-stdin"))), "f\n")
	})
	t.Run("cache", func(t *testing.T) {
		cache := "type=local,dest=" + dest(t)
		b.run(t, "build", "--cache-to", cache+",mode=max", "--build-arg", "WHO=cached", "-o", "type=cacheonly", dir)
		b.run(t, "prune", "--all", "--force")
		text := b.run(t, "build", "--progress=plain", "--cache-from", strings.Replace(cache, "dest", "src", 1), "--build-arg", "WHO=cached", "-o", "type=cacheonly", dir)
		if n := len(cachedStep.FindAllString(text, -1)); n != 4 {
			t.Errorf("%d steps of 4 were in the cache:\n%s", n, text)
		}
	})
	t.Run("history", func(t *testing.T) {
		list := strings.Split(strings.TrimSpace(b.run(t, "history", "ls", "--format", "{{.Ref}} {{.Status}}")), "\n")
		if len(list) < 8 {
			t.Fatalf("%d builds: %v", len(list), list)
		}
		says(t, strings.Join(list, "\n"), "Completed")
		says(t, b.run(t, "history", "inspect"), "Build Steps:", "WHO\t\tcached", "pkg:docker/"+w.registry.Addr+"/busybox@latest")
		says(t, b.run(t, "history", "logs", "--progress=plain"), "COPY f /f")
		b.run(t, "history", "rm", "--all")
		if left := strings.TrimSpace(b.run(t, "history", "ls", "--format", "{{.Ref}}")); left != "" {
			t.Errorf("builds that were removed: %s", left)
		}
	})
	t.Run("du and prune", func(t *testing.T) {
		says(t, b.run(t, "du", "--verbose"), "[internal] load build context", "Reclaimable:", "Total:")
		says(t, b.run(t, "prune", "--all", "--force"), "Total:")
		says(t, b.run(t, "du"), "Total:", "0B")
	})
	t.Run("what fails", func(t *testing.T) {
		text, err := b.command("build", "--progress=plain", "-o", "type=cacheonly", folder(t, "Dockerfile", "FROM "+w.base+"\nRUN echo said && exit 7\n")).CombinedOutput()
		if err == nil {
			t.Error("a step that fails is none")
		}
		says(t, string(text), "said", "exit code: 7", "2 | >>> RUN echo said && exit 7")
		says(t, b.run(t, "history", "ls"), "Error")
	})
	t.Run("remove", func(t *testing.T) {
		b.run(t, "rm", "varve")
		if text, err := b.command("inspect", "varve").CombinedOutput(); err == nil {
			t.Errorf("a builder that was removed:\n%s", text)
		}
	})
}
