package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/tonistiigi/fsutil"

	"varve.dev/benchmarks/bench"
)

// engine is a daemon under test.
type engine struct {
	name   string
	addr   string // of BuildKit's API
	store  string // the directory that is measured
	debug  http.Client
	cmd    *exec.Cmd
	eye    *eye
	builds []sample
}

// cacheShare of the cap is the build cache's: what a step writes while it runs is
// claimed when it has ended, and needs room until then.
const cacheShare = 0.9

// startVarve starts varve as its users do, by a configuration file.
func startVarve(ctx context.Context, b *bench.Bench, dir, bin, registry string, limit int64) (*engine, error) {
	config := fmt.Sprintf("root = %q\nstate = %q\n[registry]\nplain_http = [%q]\n[gc]\nsize = \"%d\"\ncache = \"%d\"\n[debug]\nlisten = \"unix://%s\"\n",
		dir+"/store", dir+"/state", registry, limit, int64(cacheShare*float64(limit)), dir+"/debug.sock")
	e := &engine{name: "varve", addr: "unix://" + dir + "/state/varve.sock", store: dir + "/store"}
	return e, e.start(ctx, b, dir, config, bin+"/varve", "--config", dir+"/config.toml", "daemon")
}

// startBuildkitd starts buildkitd, with the cap in a policy that spares nothing.
func startBuildkitd(ctx context.Context, b *bench.Bench, dir, bin, registry string, limit int64) (*engine, error) {
	config := fmt.Sprintf("root = %q\n[grpc]\n  address = [\"unix://%s\"]\n  debugAddress = \"unix://%s\"\n[registry.%q]\n  http = true\n[worker.containerd]\n  enabled = false\n"+
		"[worker.oci]\n  snapshotter = \"overlayfs\"\n  binary = \"runc\"\n  networkMode = \"host\"\n  gc = true\n[[worker.oci.gcpolicy]]\n  all = true\n  maxUsedSpace = %d\n",
		dir+"/store", dir+"/sock", dir+"/debug.sock", registry, limit)
	e := &engine{name: "buildkitd", addr: "unix://" + dir + "/sock", store: dir + "/store"}
	return e, e.start(ctx, b, dir, config, bin+"/buildkitd", "--config", dir+"/config.toml")
}

// start starts the daemon and looks at it, until the bench's end.
func (e *engine) start(ctx context.Context, b *bench.Bench, dir, config string, command ...string) error {
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(dir+"/config.toml", []byte(config), 0o600)); err != nil {
		return err
	}
	e.debug.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", dir+"/debug.sock")
	}}
	e.cmd = exec.Command(command[0], command[1:]...)
	if err := b.Start(ctx, e.cmd, func() error { _, err := e.heap(ctx); return err }); err != nil {
		return err
	}
	e.eye = watch(e)
	b.AtEnd(func() error { e.eye.end(); return nil })
	return nil
}

// build builds as buildctl does, on a connection of its own, and takes a sample.
// The image of each takes the name from the one before.
func (e *engine) build(ctx context.Context, dir, dockerfile string) error {
	files, err := fsutil.NewFS(dir)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644); err != nil {
		return err
	}
	c, err := client.New(ctx, e.addr)
	if err != nil {
		return err
	}
	defer c.Close()
	status := make(chan *client.SolveStatus)
	var told strings.Builder
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s := range status {
			for _, l := range s.Logs {
				told.Write(l.Data)
			}
		}
	}()
	begin := time.Now()
	_, err = c.Solve(ctx, nil, client.SolveOpt{
		Frontend: "dockerfile.v0", LocalMounts: map[string]fsutil.FS{"context": files, "dockerfile": files},
		Exports: []client.ExportEntry{{Type: client.ExporterImage, Attrs: map[string]string{"name": "docker.io/library/soak:latest"}}},
	}, status)
	<-done
	if err != nil {
		return fmt.Errorf("%w: %s: %s", err, told.String(), e.cmd.Stderr)
	}
	took := time.Since(begin)
	heap, err := e.heap(ctx)
	if err != nil {
		return err
	}
	s := e.eye.since()
	s.took, s.heap = took, heap
	e.builds = append(e.builds, s)
	return nil
}
