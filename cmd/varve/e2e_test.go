package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
)

func TestMain(m *testing.M) {
	code := m.Run()
	testkit.RemoveBinaries()
	os.Exit(code)
}

// host is a machine with varve on it: a root, a state directory, binaries.
type host struct {
	t    *testing.T
	bin  string
	root string
	env  []string
}

// newHost returns a host with an empty store; at the end of the test its store
// is checked, deeply, by the witness.
func newHost(t *testing.T) *host {
	t.Helper()
	return newHostAt(t, filepath.Join(t.TempDir(), "root"))
}

// newHostAt has the store at root.
func newHostAt(t *testing.T, root string) *host {
	t.Helper()
	testkit.NeedRoot(t)
	h := &host{t: t, bin: testkit.Binaries(t), root: root}
	h.env = append(os.Environ(), "VARVE_ROOT="+h.root, "VARVE_STATE="+t.TempDir())
	t.Cleanup(h.check)
	return h
}

func (h *host) check() {
	if err := teststore.Check(h.root); err != nil {
		h.t.Error(err)
	}
}

func (h *host) command(args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(h.bin, "varve"), args...)
	cmd.Env = h.env
	return cmd
}

// try runs varve and returns what it printed and its exit code.
func (h *host) try(args ...string) (string, int) {
	h.t.Helper()
	cmd := h.command(args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		h.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func (h *host) run(args ...string) string {
	h.t.Helper()
	out, code := h.try(args...)
	if code != 0 {
		h.t.Fatalf("varve %s: exit code %d\n%s", strings.Join(args, " "), code, out)
	}
	return out
}

// dockerfile makes a build context of a Dockerfile and other files.
func dockerfile(t *testing.T, text string, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	all := append([]string{"Dockerfile", text}, files...)
	for i := 0; i < len(all); i += 2 {
		name := filepath.Join(dir, all[i])
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(all[i+1]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// busybox serves the busybox image and returns its name.
func busybox(t *testing.T) string {
	t.Helper()
	registry := testkit.Registry(t)
	return registry.Push(t, testkit.Busybox(t), "busybox:latest")
}

func TestPullRunCheckRemove(t *testing.T) {
	h := newHost(t)
	name := busybox(t)
	h.run("pull", name)
	if out, code := h.try("run", "--rm", "-e", "A=b", name, "sh", "-c", "echo $A; exit 37"); code != 37 || !strings.Contains(out, "b\n") {
		t.Errorf("run: code %d, output %q", code, out)
	}
	if out := h.run("run", "--rm", "-u", "7:8", name, "sh", "-c", "id -G; echo $HOSTNAME | wc -c"); out != "8\n13\n" {
		t.Errorf("groups and host name: %q", out)
	}
	if out := h.run("images"); !strings.Contains(out, name) {
		t.Errorf("images:\n%s", out)
	}
	if out := h.run("fsck", "--deep"); !strings.Contains(out, "clean") {
		t.Errorf("fsck:\n%s", out)
	}
	h.run("tag", name, "second:name")
	h.run("rmi", name)
	if out := h.run("run", "--rm", "--network", "none", "second:name", "true"); out != "" {
		t.Errorf("run under the second name printed %q", out)
	}
	h.run("rmi", "second:name")
	if out := h.run("info"); !strings.Contains(out, "Layers:      0") || !strings.Contains(out, "Blobs:       0") {
		t.Errorf("after the last name went:\n%s", out)
	}
}

func TestSaveAndLoad(t *testing.T) {
	h := newHost(t)
	name := busybox(t)
	h.run("pull", name)
	archive := filepath.Join(t.TempDir(), "image.tar")
	h.run("save", "-o", archive, name)
	other := newHost(t)
	other.run("load", "-i", archive)
	if out := other.run("run", "--rm", name, "echo", "loaded"); out != "loaded\n" {
		t.Errorf("run of the loaded image: %q", out)
	}
}

func TestBuild(t *testing.T) {
	h := newHost(t)
	name := busybox(t)
	dir := dockerfile(t, `FROM `+name+` AS base
ARG COLOUR=grey
ENV COLOUR=$COLOUR
RUN echo "$COLOUR" > /colour
FROM base AS left
RUN echo left > /side
FROM base AS right
RUN echo right > /side
FROM base
COPY --from=left /side /left
COPY --from=right /side /right
COPY --chown=7:8 --chmod=640 kept.txt /in
COPY docs/*.md /docs/
RUN <<EOF
rm /made/../colour || rm /colour
mkdir /made
EOF
RUN --mount=type=bind,from=left,target=/mnt --mount=type=tmpfs,target=/t cat /mnt/side > /from-mount && touch /t/x
RUN --mount=type=cache,target=/cache echo run >> /cache/log && cp /cache/log /log
RUN --mount=type=cache,from=right,target=/begun --mount=type=cache,target=/owned,uid=7,mode=0700 cat /begun/side > /from-begun && stat -c %u:%a /owned >> /from-begun
USER 7
WORKDIR /made
CMD ["sh", "-c", "cat /left /right /from-mount /log /from-begun; ls -ln /in; ls /docs; ls /colour"]
`, "kept.txt", "kept\n", "ignored.txt", "x", "docs/a.md", "a", "docs/b.md", "b", "docs/c.txt", "c", ".dockerignore", "ignored.txt\ndocs/b.md\n")
	if out := h.run("build", "-t", "built", dir); !strings.Contains(out, " 0 cached") {
		t.Errorf("first build:\n%s", out)
	}
	out, code := h.try("run", "--rm", "built")
	for _, want := range []string{"left\nright\nleft\nrun\nright\n7:700\n", "-rw-r-----    1 7        8", "a.md", "No such file"} {
		if !strings.Contains(out, want) {
			t.Errorf("run (code %d) lacks %q:\n%s", code, want, out)
		}
	}
	if strings.Contains(out, "b.md") || strings.Contains(out, "c.txt") {
		t.Errorf("what is ignored or does not match was copied:\n%s", out)
	}

	// The same again, with other times: nothing runs.
	now := time.Now()
	if err := os.Chtimes(filepath.Join(dir, "kept.txt"), now, now); err != nil {
		t.Fatal(err)
	}
	if out := h.run("build", "-t", "built", dir); !strings.Contains(out, " 0 run") {
		t.Errorf("second build ran something:\n%s", out)
	}
	// A file that is ignored changes nothing.
	if err := os.WriteFile(filepath.Join(dir, "ignored.txt"), []byte("other"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := h.run("build", "-t", "built", dir); !strings.Contains(out, " 0 run") {
		t.Errorf("a build ran for an ignored file:\n%s", out)
	}
	// A file that is copied runs its copy and what comes after, no more.
	if err := os.WriteFile(filepath.Join(dir, "docs", "a.md"), []byte("new"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := h.run("build", "-t", "built", dir); !strings.Contains(out, " 6 run") {
		t.Errorf("build after a change:\n%s", out)
	}
	if out := h.run("build", "-t", "blue", "--build-arg", "COLOUR=blue", dir); strings.Contains(out, " 0 run") {
		t.Errorf("a build with another argument ran nothing:\n%s", out)
	}
}

// COPY --link makes the same tree as COPY, and is not carried out again when
// only what it is put on has changed.
func TestCopyLink(t *testing.T) {
	h := newHost(t)
	name := busybox(t)
	text := func(link, version string) string {
		return `FROM ` + name + ` AS parts
RUN mkdir -p /out/sub && echo from > /out/sub/file && ln -s sub/file /out/link && chown 5:6 /out/sub/file
FROM ` + name + `
RUN echo ` + version + ` > /version && mkdir -p /app/sub && echo theirs > /app/sub/file && echo kept > /app/kept && mkdir /gone
RUN rmdir /gone
COPY ` + link + ` --from=parts /out/ /app/
COPY ` + link + ` mine /app/sub/
COPY ` + link + ` --chown=7:8 mine /gone/
RUN cat /app/sub/file /app/kept /app/sub/mine > /all && rm /app/kept
CMD ["sh", "-c", "cat /version /all; ls -lnR /app /gone | sed 's/[A-Z][a-z][a-z] [ 0-9]* [ 0-9:]* / /'"]
`
	}
	dir := func(link, version string) string { return dockerfile(t, text(link, version), "mine", "mine\n") }
	h.run("build", "-t", "plain", dir("", "1"))
	h.run("build", "-t", "linked", dir("--link", "1"))
	plain, linked := h.run("run", "--rm", "plain"), h.run("run", "--rm", "linked")
	if plain != linked || !strings.HasPrefix(linked, "1\nfrom\nkept\nmine\n") {
		t.Errorf("COPY gives\n%s\nCOPY --link gives\n%s", plain, linked)
	}
	// Two RUNs of the base, three merges and what comes after; none of the
	// three copies, and nothing of what they copy from.
	if out := h.run("build", "-t", "linked", dir("--link", "2")); !strings.Contains(out, " 6 run") {
		t.Errorf("after a change of the base:\n%s", out)
	}
	if out := h.run("run", "--rm", "linked"); out != "2"+plain[1:] {
		t.Errorf("after a change of the base:\n%s", out)
	}
}

// The image that is built can be pulled from a registry by another host.
func TestPushWhatWasBuilt(t *testing.T) {
	h := newHost(t)
	registry := testkit.Registry(t)
	base := registry.Push(t, testkit.Busybox(t), "busybox:latest")
	dir := dockerfile(t, "FROM "+base+"\nRUN rm -r /tmp && mkfifo /pipe && ln /bin/busybox /linked\nCMD [\"ls\", \"/\"]\n")
	name := registry.Ref("built:1")
	h.run("build", "-t", name, dir)
	h.run("push", name)
	other := newHost(t)
	other.run("pull", name)
	out := other.run("run", "--rm", name)
	if !strings.Contains(out, "pipe") || !strings.Contains(out, "linked") || strings.Contains(out, "tmp") {
		t.Errorf("pulled image shows:\n%s", out)
	}
}

func TestBadInput(t *testing.T) {
	h := newHost(t)
	name := busybox(t)
	h.run("pull", name)
	for _, c := range []struct {
		what string
		args []string
		want []string
	}{
		{"no Dockerfile", []string{"build", t.TempDir()}, []string{"Dockerfile"}},
		{"a Dockerfile that is none", []string{"build", dockerfile(t, "FROM "+name+"\nNONSENSE here\n")}, []string{"NONSENSE", "line 2"}},
		{"a base that is nowhere", []string{"build", dockerfile(t, "FROM "+strings.Replace(name, "busybox", "nowhere", 1)+"\n")}, []string{"nowhere", "not found"}},
		{"a step that fails", []string{"build", dockerfile(t, "FROM "+name+"\nRUN true\nRUN exit 3\n")}, []string{"Dockerfile:3", "exit code: 3"}},
		{"a name that an image cannot hold", []string{"build", dockerfile(t, "FROM "+name+"\nRUN touch /tmp/.wh.x\n")}, []string{"tmp/.wh.x", "deletion"}},
		{"a file that is not there", []string{"build", dockerfile(t, "FROM "+name+"\nCOPY nothing /\n")}, []string{"nothing", "not found"}},
		{"a call that the frontend has not", []string{"build", "--call", "guess", dockerfile(t, "FROM "+name+"\n")}, []string{"guess"}},
		{"no such directory", []string{"build", "/no/such/directory"}, []string{"/no/such/directory"}},
		{"an image that is nowhere", []string{"run", "--pull", "never", "nobody/has:this"}, []string{"nobody/has:this", "not found"}},
		{"a bad reference", []string{"pull", "UPPER CASE"}, []string{"UPPER CASE"}},
		{"a bad volume", []string{"run", "-v", "relative:/x", name, "true"}, []string{"relative:/x"}},
		{"a bad limit", []string{"run", "-m", "lots", name, "true"}, []string{"lots"}},
		{"no such user", []string{"run", "-u", "nobodyatall", name, "true"}, []string{"nobodyatall"}},
		{"a tag on nothing", []string{"tag", "nothing", "x"}, []string{"nothing", "not found"}},
	} {
		out, code := h.try(c.args...)
		if code == 0 {
			t.Errorf("%s: exit code 0\n%s", c.what, out)
		}
		for _, w := range c.want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: the error lacks %q:\n%s", c.what, w, out)
			}
		}
	}
}

// Eight commands at once on one root, without a daemon, and one while a
// container runs.
func TestManyCommandsOnOneRoot(t *testing.T) {
	h := newHost(t)
	registry := testkit.Registry(t)
	name := registry.Push(t, testkit.Busybox(t), "busybox:latest")
	awkward := registry.Push(t, testkit.Awkward(t), "awkward:latest")
	h.run("pull", name)
	waiting := h.command("run", "--rm", "-i", name, "sh", "-c", "echo started; cat")
	in, err := waiting.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	waiting.Stdout, waiting.Stderr = &out, &out
	if err := waiting.Start(); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for i := range 8 {
		args := []string{"pull", awkward}
		if i%2 == 0 {
			args = []string{"build", "-t", fmt.Sprintf("built%d", i), dockerfile(t, fmt.Sprintf("FROM %s\nRUN echo shared > /shared\nRUN echo %d > /own\n", name, i/4))}
		}
		all.Go(func() {
			if out, code := h.try(args...); code != 0 {
				t.Errorf("varve %s: exit code %d\n%s", strings.Join(args, " "), code, out)
			}
		})
	}
	all.Wait()
	fmt.Fprintln(in, "still here")
	in.Close()
	if err := waiting.Wait(); err != nil || !strings.Contains(out.String(), "still here") {
		t.Errorf("the container that ran meanwhile: %v\n%s", err, out.String())
	}
}

func TestDaemon(t *testing.T) {
	h := newHost(t)
	name := busybox(t)
	socket := filepath.Join(t.TempDir(), "varve.sock")
	d := h.command("daemon", "--listen", "unix://"+socket)
	var log bytes.Buffer
	d.Stderr = &log
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() {
		_ = d.Process.Signal(os.Interrupt)
		if err := d.Wait(); err != nil {
			t.Errorf("daemon: %v\n%s", err, log.String())
		}
	})
	defer stop()
	for range 100 {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if fi, err := os.Stat(socket); err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatalf("socket: %v, %v", fi, err)
	}
	at := "--host=unix://" + socket
	h.run(at, "pull", name)
	dir := dockerfile(t, "FROM "+name+"\nCOPY a /a\nRUN cat /a > /b\nCMD cat /b\n", "a", "through the socket\n")
	h.run(at, "build", "-t", "remote", dir)
	if out := h.run(at, "run", "--rm", "remote"); out != "through the socket\n" {
		t.Errorf("run: %q", out)
	}
	archive := filepath.Join(t.TempDir(), "image.tar")
	h.run(at, "save", "-o", archive, "remote")
	if out := newHost(t).run("load", "-q", "-i", archive); out != "Loaded image: remote:latest\n" {
		t.Errorf("load of what was saved through the socket: %q", out)
	}
	if out := h.run(at, "fsck", "--deep"); !strings.Contains(out, "clean") {
		t.Errorf("fsck:\n%s", out)
	}
	if out, code := h.try("--host=unix:///no/such.sock", "images"); code == 0 || !strings.Contains(out, "/no/such.sock") {
		t.Errorf("a host that is not there: code %d, %s", code, out)
	}
	stop()
}

// A base image that is removed while its tree is in the cache stands there
// without its blobs: a build that uses it writes its layers anew, and leaves the
// base what images know it by.
func TestBuildOnABaseWithoutBlobs(t *testing.T) {
	h := newHost(t)
	name := busybox(t)
	for _, step := range []string{"one", "two"} {
		h.run("build", "-t", "built", dockerfile(t, "FROM "+name+"\nRUN echo here > /it\nLABEL step="+step+"\n"))
		if step == "two" {
			break
		}
		for id := range strings.FieldsSeq(h.run("images", "--quiet")) {
			h.run("rmi", "--force", id)
		}
	}
	h.run("pull", name)
	// What is built on it goes on from the blobs that it was written as.
	h.run("build", "-t", "again", dockerfile(t, "FROM built\nLABEL step=three\n"))
}
