package testkit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

// registryBinary is what Debian's package of the same name installs.
const registryBinary = "docker-registry"

// registryStart bounds the time from start to the first answer. A registry
// answers within a few hundred milliseconds; a loaded machine takes longer.
const registryStart = 30 * time.Second

// RegistryServer is one running docker-registry.
type RegistryServer struct {
	// Addr is host:port on loopback, as it stands in an image's name.
	Addr string
	// Storage is the registry's own folder. Tests damage it by hand.
	Storage string

	pid  int
	done chan struct{}
	log  *Buffer
	once sync.Once
}

// Registry runs a registry for the length of the test. Its storage is a
// temporary folder; manifests and blobs can be deleted.
func Registry(t testing.TB) *RegistryServer {
	t.Helper()
	r, err := StartRegistry(t.Context(), t.TempDir(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Stop()
		if t.Failed() {
			t.Logf("registry %s wrote:\n%s", r.Addr, r.log.tail())
		}
	})
	return r
}

// StartRegistry runs a registry that keeps its data in dir and listens on
// addr; port 0 takes a free one. It returns once the registry answers. The
// caller stops it with [RegistryServer.Stop]; it also ends with this process.
func StartRegistry(ctx context.Context, dir, addr string) (*RegistryServer, error) {
	if _, err := exec.LookPath(registryBinary); err != nil {
		return nil, fmt.Errorf("%s is not installed: apt-get install docker-registry: %w", registryBinary, err)
	}
	// The registry cannot be handed a listening socket, so between choosing
	// the port and its bind somebody else may take it. Another port then.
	for attempt := 0; ; attempt++ {
		r, err := tryRegistry(ctx, dir, addr)
		if err == nil || attempt == 4 || !errors.Is(err, errPortTaken) {
			return r, err
		}
	}
}

var errPortTaken = errors.New("port taken")

func tryRegistry(ctx context.Context, dir, addr string) (*RegistryServer, error) {
	addr, err := freeAddr(addr)
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "config.yml")
	storage := filepath.Join(dir, "storage")
	if err := os.WriteFile(config, []byte(registryConfig(storage, addr)), 0o600); err != nil {
		return nil, err
	}
	r := &RegistryServer{Addr: addr, Storage: storage, done: make(chan struct{}), log: &Buffer{}}
	if err := r.start(config); err != nil {
		return nil, err
	}
	if err := r.await(ctx); err != nil {
		r.Stop()
		return nil, err
	}
	return r, nil
}

// registryConfig is as small as the registry accepts. Its blob descriptor
// cache is off so that a test may damage a file and have it served.
func registryConfig(storage, addr string) string {
	return fmt.Sprintf(`version: 0.1
log:
  level: error
  accesslog:
    disabled: true
storage:
  filesystem:
    rootdirectory: %q
  delete:
    enabled: true
  maintenance:
    uploadpurging:
      enabled: false
http:
  addr: %q
`, storage, addr)
}

// start runs the registry on a thread of its own: the parent-death signal
// fires when the *thread* that forked ends, and Go ends threads at will.
func (r *RegistryServer) start(config string) error {
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer close(r.done)
		cmd := exec.Command(registryBinary, "serve", config)
		cmd.Stdout, cmd.Stderr = r.log, r.log
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		r.pid = cmd.Process.Pid
		started <- nil
		_ = cmd.Wait() // it is ended by a signal; the log says what went wrong
	}()
	return <-started
}

// await returns nil once GET /v2/ is answered with 200.
func (r *RegistryServer) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, registryStart)
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Addr+"/v2/", nil)
		if err != nil {
			return err
		}
		if resp, err := http.DefaultClient.Do(req); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-r.done:
			if bytes.Contains(r.log.tail(), []byte("address already in use")) {
				return errPortTaken
			}
			return fmt.Errorf("%s ended before it answered:\n%s", registryBinary, r.log.tail())
		case <-ctx.Done():
			return fmt.Errorf("%s did not answer at %s: %w\n%s", registryBinary, r.Addr, ctx.Err(), r.log.tail())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Stop ends the registry and returns when it is gone. It may be called again.
func (r *RegistryServer) Stop() {
	r.once.Do(func() {
		select {
		case <-r.done:
			return
		default:
		}
		_ = syscall.Kill(r.pid, syscall.SIGKILL) // its data is thrown away or already on disk
		<-r.done
	})
}

// Ref is the name of repo:tag in this registry.
func (r *RegistryServer) Ref(repoTag string) string { return r.Addr + "/" + repoTag }

func freeAddr(addr string) (string, error) {
	if _, port, err := net.SplitHostPort(addr); err != nil || port != "0" {
		return addr, err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// Buffer collects what a child writes while others read it.
type Buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// String is all of it so far.
func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// tail is the end of it, a page at most.
func (b *Buffer) tail() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := b.buf.Bytes()
	return bytes.Clone(all[max(0, len(all)-4096):])
}
