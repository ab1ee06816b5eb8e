// Package testbuild has Dockerfiles built in stores that the test's process has
// open: BuildKit's request and its session, without a socket.
package testbuild

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strings"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	bkerrdefs "github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/staticfs"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
	"golang.org/x/sync/errgroup"

	"varve.dev/api/varve"
	"varve.dev/builder"
)

// Solver builds: daemon.Engine and daemon.Keeper do.
type Solver interface {
	Solve(ctx context.Context, req builder.Request) (builder.Response, error)
}

// Build says what to build.
type Build struct {
	Name       string // of the image
	Dockerfile string // its text; empty: the file of that name in Dir
	Dir        string // the build context; empty: one without files
	Network    string // of RUN steps, if not the builder's usual one
	Registry   varve.Registry
	Told       func(*client.SolveStatus) // is told what the client is; nil: nobody
}

// Result is what came of a build.
type Result struct {
	builder.Response
	// Cached and Ran count the instructions but FROM: those that were known,
	// and those that were carried out.
	Cached, Ran int
}

// Run builds. When it returns, nothing of the session is left.
func Run(ctx context.Context, s Solver, b Build) (r Result, err error) {
	registry, err := json.Marshal(b.Registry)
	if err != nil {
		return r, err
	}
	dirs, err := b.dirs()
	if err != nil {
		return r, err
	}
	req := builder.Request{
		Frontend: "dockerfile.v0",
		Attrs:    map[string]string{varve.RegistryOption: string(registry)},
		Exports:  []builder.Export{{Type: client.ExporterImage, Attrs: map[string]string{"name": b.Name}}},
		Progress: func(s *client.SolveStatus) {
			r.tell(s)
			if b.Told != nil {
				b.Told(s)
			}
		},
	}
	if b.Network != "" {
		req.Attrs["force-network-mode"] = b.Network
	}
	err = inSession(ctx, b.Dir, dirs, func(c builder.Client) (err error) {
		req.Client = c
		r.Response, err = s.Solve(ctx, req)
		return err
	})
	return r, err
}

// Told is what a client shows of an error: its text, and the line of the
// Dockerfile that it comes from.
func Told(err error) string {
	text := err.Error()
	for _, s := range bkerrdefs.Sources(err) {
		if len(s.Ranges) > 0 {
			text += fmt.Sprintf(" (%s:%d)", s.Info.GetFilename(), s.Ranges[0].GetStart().GetLine())
		}
	}
	return text
}

// dirs are what the frontend asks for, by the names that it asks by.
func (b Build) dirs() (dirs filesync.StaticDirSource, err error) {
	files := fsutil.FS(staticfs.NewFS())
	if b.Dir != "" {
		if files, err = fsutil.NewFS(b.Dir); err != nil {
			return nil, err
		}
	}
	dirs = filesync.StaticDirSource{"context": files, "dockerfile": files}
	if b.Dockerfile != "" {
		text := staticfs.NewFS()
		text.Add("Dockerfile", &fstypes.Stat{Mode: 0o644}, []byte(b.Dockerfile))
		dirs["dockerfile"] = text
	}
	return dirs, nil
}

// tell counts what is over.
func (r *Result) tell(s *client.SolveStatus) {
	for _, v := range s.Vertexes {
		stage, instruction, ok := strings.Cut(v.Name, "] ")
		switch {
		case v.Completed == nil || !ok || stage == "[internal" || strings.HasPrefix(instruction, "FROM "):
		case v.Cached:
			r.Cached++
		default:
			r.Ran++
		}
	}
}

// inSession calls fn with a client that has directories.
func inSession(ctx context.Context, key string, dirs filesync.StaticDirSource, fn func(builder.Client) error) error {
	manager, err := session.NewManager()
	if err != nil {
		return fmt.Errorf("sessions: %w", err)
	}
	s, err := session.NewSession(ctx, key)
	if err != nil {
		return fmt.Errorf("session: %w", err)
	}
	s.Allow(filesync.NewFSSyncProvider(dirs))
	// A build that is called off ends by itself: what it still asks is answered.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var g errgroup.Group
	g.Go(func() error {
		return s.Run(ctx, func(ctx context.Context, _ string, meta map[string][]string) (net.Conn, error) {
			mine, theirs := net.Pipe()
			g.Go(func() error { return manager.HandleConn(ctx, theirs, meta) })
			return mine, nil
		})
	})
	err = fn(caller{manager, s.ID()})
	cancel()
	if ended := g.Wait(); err == nil && ended != nil {
		err = fmt.Errorf("session: %w", ended)
	}
	return err
}

// caller is the client of the one session that there is.
type caller struct {
	sessions *session.Manager
	id       string
}

func (c caller) ID() string { return c.id }

func (c caller) Caller(ctx context.Context, _ string) (session.Caller, error) {
	return c.sessions.Get(ctx, c.id, false)
}
