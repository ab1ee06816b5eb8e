package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"varve.dev/api/buildkit"
	"varve.dev/api/varve"
	"varve.dev/errdefs"
)

// socketPerm makes a socket root's alone: whoever may open it may do
// everything, until there are roles.
const socketPerm = 0o600

// Server answers calls on a unix socket: varve's own over HTTP, and BuildKit's
// over gRPC.
type Server struct {
	http     *http.Server
	grpc     *grpc.Server
	listener net.Listener
	path     string
	done     chan error

	mu     sync.Mutex
	guests int
	idle   chan struct{} // closed while there are no guests
	last   bool          // no new guests are taken
}

// handler answers varve's own calls to the store that k keeps.
func handler(k *Keeper) http.Handler {
	mux := http.NewServeMux()
	mux.Handle(varve.Prefix, varve.Handler(k))
	mux.Handle("GET "+MetricsPath, Metrics(k))
	return mux
}

// Listen serves calls on a unix socket at path. A socket that is there and
// that nobody answers is replaced; the caller owns the store, so nobody else
// can be serving it. Errors: ErrUnavailable, naming the path.
func Listen(path string, k *Keeper) (*Server, error) {
	l, err := listenUnix(path)
	if err != nil {
		return nil, err
	}
	s := &Server{listener: l, path: path, done: make(chan error, 1), idle: make(chan struct{})}
	close(s.idle)
	s.http = &http.Server{
		Handler:           s.count(handler(k)),
		ReadHeaderTimeout: 10 * time.Second,
	}
	if s.grpc, err = s.builds(k); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	byProtocol := split(l)
	go func() { s.done <- s.http.Serve(byProtocol.http1) }()
	go func() { _ = s.grpc.Serve(byProtocol.http2) }()
	return s, nil
}

// dyingWait is how long a socket may be taken that nobody serves: one who is killed
// while he starts a process leaves it to that one, until it executes its program.
const dyingWait = time.Second

// answered tells whether somebody takes calls on a socket, and goes on to.
func answered(path string) bool {
	for begin := time.Now(); ; time.Sleep(dyingWait / 50) {
		conn, err := net.DialTimeout("unix", path, dyingWait)
		if err != nil {
			return false
		}
		conn.Close()
		if time.Since(begin) > dyingWait {
			return true
		}
	}
}

// listenUnix makes a socket that is root's alone.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("socket %s: %w: %w", path, err, errdefs.ErrUnavailable)
	}
	if answered(path) {
		return nil, fmt.Errorf("socket %s: another process answers on it: %w", path, errdefs.ErrUnavailable)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("socket %s: %w: %w", path, err, errdefs.ErrUnavailable)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w: %w", path, err, errdefs.ErrUnavailable)
	}
	if err := os.Chmod(path, socketPerm); err != nil {
		l.Close()
		return nil, fmt.Errorf("socket %s: %w: %w", path, err, errdefs.ErrUnavailable)
	}
	return l, nil
}

// maxMessage bounds a gRPC message, in bytes: a file that a frontend reads.
const maxMessage = 17 << 20

// builds answers BuildKit's calls.
func (s *Server) builds(k *Keeper) (*grpc.Server, error) {
	calls, err := buildkit.New(k)
	if err != nil {
		return nil, err
	}
	closing := status.Error(codes.Unavailable, closingText)
	unary := func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		if !s.enter(false) {
			return nil, closing
		}
		defer s.leave()
		return grpcerrors.UnaryServerInterceptor(ctx, req, info, handle)
	}
	// A session is open for as long as its client wants; it is no call.
	server := grpc.NewServer(grpc.UnaryInterceptor(unary), grpc.StreamInterceptor(grpcerrors.StreamServerInterceptor), grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	calls.Register(server)
	return server, nil
}

// count keeps track of the calls under way. When the server is about to end, a
// new guest is told to look for the next owner of the store.
func (s *Server) count(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.enter(varve.IsStay(r)) {
			w.Header().Set("Connection", "close")
			http.Error(w, closingText, http.StatusServiceUnavailable)
			return
		}
		defer s.leave()
		next.ServeHTTP(w, r)
	})
}

// closingText answers a call that came too late.
const closingText = "the store is being closed"

// enter counts a call in. Those who stay may go on calling to the end.
func (s *Server) enter(newGuest bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last && (newGuest || s.guests == 0) {
		return false
	}
	if s.guests == 0 {
		s.idle = make(chan struct{})
	}
	s.guests++
	return true
}

func (s *Server) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.guests--; s.guests == 0 {
		close(s.idle)
	}
}

// Linger serves until nobody uses the server any more; from then on nobody can.
// Guests that come meanwhile are taken: the store is locked, they could only
// wait.
func (s *Server) Linger(ctx context.Context) error {
	for {
		s.mu.Lock()
		idle := s.idle
		s.last = s.guests == 0
		over := s.last
		s.mu.Unlock()
		if over {
			return nil
		}
		select {
		case <-idle:
		case <-ctx.Done():
			return fmt.Errorf("other commands still use the store through this one: %w", ctx.Err())
		}
	}
}

// Close takes no new guests, lets those that are there end what they do, for
// as long as ctx allows, and ends the server. The socket's name goes first, so
// that the next process looks for the store instead of for this server.
func (s *Server) Close(ctx context.Context) error {
	_ = os.Remove(s.path)
	s.mu.Lock()
	s.last = true
	idle := s.idle
	s.mu.Unlock()
	var err error
	select {
	case <-idle:
	case <-ctx.Done():
		err = fmt.Errorf("calls were under way at shutdown: %w", ctx.Err())
	}
	s.grpc.Stop()
	err = errors.Join(err, s.http.Close())
	if serr := <-s.done; !errors.Is(serr, http.ErrServerClosed) && !errors.Is(serr, net.ErrClosed) {
		err = errors.Join(err, serr)
	}
	return err
}
