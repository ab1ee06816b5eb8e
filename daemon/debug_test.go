package daemon

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
)

// A daemon's heap can be asked for, as buildkitd's can, on a socket that is
// root's alone.
func TestDebug(t *testing.T) {
	testkit.NeedRoot(t)
	k := keep(t, testPlace(t))
	path := filepath.Join(t.TempDir(), "debug.sock")
	s, err := ServeDebug("unix://"+path, k.Keeper)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != socketPerm {
		t.Errorf("%v, %v", fi, err)
	}
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
	defer client.CloseIdleConnections()
	for page, text := range map[string]string{
		"/debug/gc": "", "/debug/pprof/heap?gc=1&debug=1": "# HeapAlloc = ", "/debug/pprof/goroutine?debug=1": "TestDebug",
		"/debug/vars": `"memstats"`, MetricsPath: "varve_build_info",
	} {
		answer, err := client.Get("http://debug" + page)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil || answer.StatusCode != http.StatusOK || !strings.Contains(string(body), text) {
			t.Errorf("%s: %v, %s: %.300s", page, err, answer.Status, body)
		}
	}
}

func TestDebugIsOfThisHost(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:0", ":0", "tcp://0.0.0.0:0", "127.0.0.1", "unix://x"} {
		if s, err := ServeDebug(addr, nil); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("debug on %q: %v", addr, err)
			if err == nil {
				s.Close()
			}
		}
	}
}
