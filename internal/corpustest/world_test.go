package corpustest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
)

func TestMain(m *testing.M) {
	syscall.Umask(0o022) // contexts are the same whoever runs the tests
	code := m.Run()
	testkit.RemoveBinaries()
	os.Exit(code)
}

// world is what the builds of the corpus are told of what is around them.
type world struct {
	dir      string // of the cases
	registry *testkit.RegistryServer
	base     string // name of the image that most cases are built on
	tree     tree   // what is in it
	diffID   string // of its one layer
	url      string // of a web server on dir
	key      string // file with a private key
}

func newWorld(t *testing.T) *world {
	t.Helper()
	testkit.NeedRoot(t)
	image := testkit.Busybox(t)
	w := &world{dir: t.TempDir(), registry: testkit.Registry(t), key: filepath.Join(t.TempDir(), "key")}
	w.base = w.registry.Push(t, image, "busybox:latest")
	w.tree, w.diffID = baseTree(t, image)
	w.url = serveFolder(t, w.dir)
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return w
}

// serveFolder serves a folder's files, and the git repositories in it by git's
// own server.
func serveFolder(t *testing.T, dir string) (url string) {
	t.Helper()
	testkit.Need(t, "git", "git")
	exec, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		t.Fatal(err)
	}
	git := &cgi.Handler{
		Path: filepath.Join(strings.TrimSpace(string(exec)), "git-http-backend"), Dir: dir,
		Env: []string{"GIT_PROJECT_ROOT=" + dir, "GIT_HTTP_EXPORT_ALL=1"}, InheritEnv: []string{"PATH"}, Stderr: &bytes.Buffer{},
	}
	files := http.FileServer(http.Dir(dir))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/.git/") {
			git.ServeHTTP(w, r)
			return
		}
		files.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// peer has scripts/peer build the programs of a peer, and returns their folder.
func peer(t *testing.T, name string) string {
	t.Helper()
	cmd := exec.Command("../../scripts/peer", name)
	var text bytes.Buffer
	cmd.Stderr = &text
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("scripts/peer %s: %v\n%s", name, err, text.String())
	}
	return strings.TrimSpace(string(out))
}

// daemonConfig is buildkitd.toml, for either daemon.
const daemonConfig = `root = %q
insecure-entitlements = ["network.host", "security.insecure"]
[registry.%q]
  http = true
[worker.containerd]
  enabled = false
[worker.oci]
  snapshotter = "overlayfs"
  binary = "runc"
  networkMode = "host"
`

// startDaemon starts a buildkitd for the length of the test and returns its
// address and its root.
func (w *world) startDaemon(t *testing.T, program string) (addr, root string) {
	t.Helper()
	dir := t.TempDir()
	root, addr = filepath.Join(dir, "root"), "unix://"+filepath.Join(dir, "sock")
	config := filepath.Join(dir, "buildkitd.toml")
	write(t, config, fmt.Sprintf(daemonConfig, root, w.registry.Addr))
	var log testkit.Buffer
	cmd := exec.Command(program, "--config", config, "--addr", addr)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s wrote:\n%s", program, log.String())
		}
	})
	ask := filepath.Join(peer(t, "buildkit"), "buildctl")
	for deadline := time.Now().Add(30 * time.Second); exec.Command(ask, "--addr", addr, "debug", "workers").Run() != nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s does not answer:\n%s", program, log.String())
		}
	}
	return addr, root
}

// startVarve starts varve in buildkitd's place. When the test ends, its store
// is checked.
func (w *world) startVarve(t *testing.T) (addr string) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "buildkitd")
	if err := os.Symlink(filepath.Join(testkit.Binaries(t), "varve"), program); err != nil {
		t.Fatal(err)
	}
	var root string
	t.Cleanup(func() { // runs when the daemon has ended
		if err := teststore.Check(filepath.Join(root, "varve")); err != nil {
			t.Error(err)
		}
	})
	addr, root = w.startDaemon(t, program)
	return addr
}
