package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"varve.dev/api/varve"
	"varve.dev/errdefs"
	"varve.dev/gc"
	"varve.dev/metadata"
)

// Place says which store a command means.
type Place struct {
	Root  string // the store's directory
	State string // where its sockets are
	// Host is the socket of a daemon to use, "unix:///path"; empty: the
	// daemon's usual one if it serves Root, otherwise embedded.
	Host string
	// Look, Limits and Entitlements: see Options. A store that somebody else has open keeps
	// to theirs.
	Look         bool
	Limits       gc.Limits
	Entitlements []string
}

// DaemonSocket is the name of a daemon's socket under State.
const DaemonSocket = "varve.sock"

// embeddedSocket is where the process that has the store open in a command
// serves it. The name has the root in it: several stores may share a state
// directory.
func (p Place) embeddedSocket() string {
	sum := sha256.Sum256([]byte(p.Root))
	return filepath.Join(p.State, "embedded-"+hex.EncodeToString(sum[:8])+".sock")
}

// Joined is a way to a store.
type Joined struct {
	varve.Backend
	// Embedded tells that the store is open in this process.
	Embedded bool
	// Dial connects to whoever has the store open, for BuildKit's protocol.
	Dial func(context.Context) (net.Conn, error)
	// Notice is what whoever opened the store has to be told.
	Notice []string
	close  func(context.Context) error
}

// Close ends the way to the store. If other commands use it through this
// process, it waits for them.
func (j *Joined) Close(ctx context.Context) error { return j.close(ctx) }

// joinTimeout bounds the search for a store that changes hands.
const joinTimeout = 30 * time.Second

// Join finds the way to a store: a daemon that serves it; another command that
// has it open; or opening it here and serving it to others meanwhile.
//
// A guest announces itself when it joins, and the process that serves stays
// until its guests are gone; whoever comes next opens the store. The file lock
// on the database decides between two who try.
func Join(ctx context.Context, p Place) (*Joined, error) {
	root, err := filepath.Abs(p.Root)
	if err != nil {
		return nil, fmt.Errorf("root %s: %w: %w", p.Root, err, errdefs.ErrInvalidArgument)
	}
	if real, err := filepath.EvalSymlinks(root); err == nil {
		root = real
	}
	p.Root = root
	if p.Host != "" {
		return joinHost(ctx, p.Host)
	}
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(wait*2, 50*time.Millisecond) {
		for _, socket := range []string{filepath.Join(p.State, DaemonSocket), p.embeddedSocket()} {
			if j := tryJoin(ctx, socket, p.Root); j != nil {
				return j, nil
			}
		}
		j, err := openEmbedded(ctx, p)
		if !errors.Is(err, metadata.ErrLocked) {
			return j, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("store %s: another process has it open and does not answer on %s: %w", p.Root, p.embeddedSocket(), errdefs.ErrUnavailable)
		case <-time.After(wait):
		}
	}
}

// joinHost uses the daemon that was named, and nothing else.
func joinHost(ctx context.Context, host string) (*Joined, error) {
	path, err := SocketPath(host)
	if err != nil {
		return nil, err
	}
	c := varve.NewClient(path)
	if _, err := c.Stay(ctx); err != nil {
		return nil, fmt.Errorf("daemon at %s: %w: %s", host, errdefs.ErrUnavailable, err.Error())
	}
	return &Joined{Backend: c, Dial: c.Dial, close: func(context.Context) error { return c.Close() }}, nil
}

// tryJoin uses the socket if somebody serves this root on it.
func tryJoin(ctx context.Context, socket, root string) *Joined {
	if _, err := os.Lstat(socket); err != nil {
		return nil
	}
	c := varve.NewClient(socket)
	served, err := c.Stay(ctx)
	if err != nil || served != root {
		c.Close()
		return nil
	}
	return &Joined{Backend: c, Dial: c.Dial, close: func(context.Context) error { return c.Close() }}
}

// openEmbedded opens the store in this process and serves it.
func openEmbedded(ctx context.Context, p Place) (*Joined, error) {
	k, err := Keep(ctx, Options{Root: p.Root, State: p.State, Embedded: true, Look: p.Look, Limits: p.Limits, Entitlements: p.Entitlements}, nil)
	if err != nil {
		return nil, err
	}
	server, err := Listen(p.embeddedSocket(), k)
	if err != nil {
		return nil, errors.Join(err, k.Close(ctx))
	}
	return &Joined{Backend: k, Embedded: true, Dial: dialer(p.embeddedSocket()), Notice: k.Rebuilt(), close: func(ctx context.Context) error {
		return errors.Join(server.Linger(ctx), server.Close(ctx), k.Close(ctx))
	}}, nil
}

func dialer(socket string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
}

// SocketPath returns the path of a "unix:///path" address.
func SocketPath(host string) (string, error) {
	const scheme = "unix://"
	if len(host) <= len(scheme) || host[:len(scheme)] != scheme || !filepath.IsAbs(host[len(scheme):]) {
		return "", fmt.Errorf("host %q is not of the form unix:///path: %w", host, errdefs.ErrInvalidArgument)
	}
	return host[len(scheme):], nil
}
