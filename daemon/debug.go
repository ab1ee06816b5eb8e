package daemon

import (
	"expvar"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"strings"
	"time"

	"varve.dev/errdefs"
)

// DebugHandler answers who looks for what a daemon's memory and time go to, under
// the paths that buildkitd has: the profiles of net/http/pprof, the variables of
// expvar, a collection of garbage on demand, and the metrics.
func DebugHandler(k *Keeper) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/debug/vars", expvar.Handler())
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/debug/gc", func(http.ResponseWriter, *http.Request) { runtime.GC() })
	mux.Handle("GET "+MetricsPath, Metrics(k))
	return mux
}

// ServeDebug serves them on a unix socket (unix:///path), which is root's alone, or
// on a TCP address (host:port, tcp://host:port), which has to be of this host
// alone, until what it returns is closed. Errors: ErrInvalidArgument,
// ErrUnavailable.
func ServeDebug(addr string, k *Keeper) (io.Closer, error) {
	l, err := listenDebug(addr)
	if err != nil {
		return nil, err
	}
	s := &http.Server{Handler: DebugHandler(k), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = s.Serve(l) }() // ends with the listener
	return s, nil
}

func listenDebug(addr string) (net.Listener, error) {
	if strings.HasPrefix(addr, "unix://") {
		path, err := SocketPath(addr)
		if err != nil {
			return nil, err
		}
		return listenUnix(path)
	}
	return listenLoopback("debug", strings.TrimPrefix(addr, "tcp://"))
}

// listenLoopback listens where nobody but this machine comes: what is served
// there asks nobody who they are.
func listenLoopback(what, addr string) (net.Listener, error) {
	at, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%s on %q: %w: %w", what, addr, err, errdefs.ErrInvalidArgument)
	}
	if !at.IP.IsLoopback() {
		return nil, fmt.Errorf("%s on %q: an address of the loopback interface and a port are needed: %w", what, addr, errdefs.ErrInvalidArgument)
	}
	l, err := net.ListenTCP("tcp", at)
	if err != nil {
		return nil, fmt.Errorf("%s on %s: %w: %w", what, addr, err, errdefs.ErrUnavailable)
	}
	return l, nil
}
