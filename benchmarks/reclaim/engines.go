package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"

	"varve.dev/api/varve"
	"varve.dev/benchmarks/bench"
)

// engine is who is measured: a daemon with a store of its own.
type engine interface {
	// pull brings an image and unpacks it.
	pull(ctx context.Context, image string) error
	// create makes a container of an image that is there, and removes it.
	create(ctx context.Context, image string) (id string, err error)
	remove(ctx context.Context, id string) error
	// removals are the commands that remove an image, by what to call them.
	removals() []removal
	// trees are the directories with a directory for each layer, and those
	// that such a one goes to when it is removed.
	trees() []string
}

// removal is a way to remove an image.
type removal struct {
	name string
	do   func(ctx context.Context, image string) error
}

// starter starts an engine.
type starter struct {
	name  string
	needs []string // programs
	start func(ctx context.Context, b *trial, dir string) (engine, error)
}

var starters = []starter{
	{"varve", nil, startVarve},
	{"containerd", []string{"containerd", "ctr"}, startContainerd},
	{"dockerd", []string{"dockerd", "docker", "containerd"}, startDocker},
}

// eachEngine starts those that are there, one after the other, for fn. prepare
// makes the directory that an engine is to have, below its own bench's; nil: that.
func (b *trial) eachEngine(ctx context.Context, prepare func(ctx context.Context, own *trial) (string, error), fn func(name string, e engine) error) error {
	for _, s := range starters {
		if len(s.needs) > 0 && !b.peers {
			continue
		}
		missing := ""
		for _, program := range s.needs {
			if _, err := exec.LookPath(program); err != nil {
				missing = program
			}
		}
		if missing != "" {
			fmt.Printf("%s is left out: there is no %s\n", s.name, missing)
			continue
		}
		own := &trial{options: b.options, Bench: bench.Within(filepath.Join(b.Dir, s.name))}
		if err := os.Mkdir(own.Dir, 0o711); err != nil {
			return err
		}
		dir, err := own.Dir, error(nil)
		if prepare != nil {
			dir, err = prepare(ctx, own)
		}
		var e engine
		if err == nil {
			e, err = s.start(ctx, own, dir)
		}
		if err == nil {
			err = fn(s.name, e)
		}
		if end := own.End(); err == nil {
			err = end
		}
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

// ours is varve's daemon.
type ours struct {
	command, root string
	env           []string
	client        *varve.Client
}

func startVarve(ctx context.Context, b *trial, dir string) (engine, error) {
	e := &ours{command: b.varve, root: filepath.Join(dir, "root")}
	state := filepath.Join(dir, "state")
	e.env = []string{"VARVE_ROOT=" + e.root, "VARVE_STATE=" + state}
	e.client = varve.NewClient(filepath.Join(state, "varve.sock"))
	b.AtEnd(e.client.Close)
	daemon := exec.Command(b.varve, "daemon")
	daemon.Env = append(os.Environ(), e.env...)
	return e, b.Start(ctx, daemon, func() error { _, err := e.client.Root(ctx); return err })
}

func (e *ours) run(ctx context.Context, args ...string) (string, error) {
	return bench.Output(ctx, e.env, append([]string{e.command}, args...)...)
}

func (e *ours) pull(ctx context.Context, image string) error {
	_, err := e.run(ctx, "pull", image)
	return err
}

func (e *ours) create(ctx context.Context, image string) (string, error) {
	c, err := e.client.Create(ctx, varve.CreateRequest{Image: image, Command: []string{"true"}, Network: "none", Pull: "never"}, nil)
	return c.ID, err
}

func (e *ours) remove(ctx context.Context, id string) error { return e.client.RemoveContainer(ctx, id) }

func (e *ours) removals() []removal {
	return []removal{{"varve rmi", func(ctx context.Context, image string) error {
		_, err := e.run(ctx, "rmi", image)
		return err
	}}}
}

func (e *ours) trees() []string {
	return []string{filepath.Join(e.root, "layers"), filepath.Join(e.root, "trash")}
}

// containerd is driven by ctr.
type containerd struct {
	root, socket string
	made         int
}

func startContainerd(ctx context.Context, b *trial, dir string) (engine, error) {
	e := &containerd{root: filepath.Join(dir, "root"), socket: filepath.Join(dir, "sock")}
	config := filepath.Join(dir, "config.toml")
	text := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n",
		e.root, filepath.Join(dir, "state"), e.socket)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	return e, b.Start(ctx, exec.Command("containerd", "-c", config, "-l", "error"), func() error { _, err := e.run(ctx, "version"); return err })
}

func (e *containerd) run(ctx context.Context, args ...string) (string, error) {
	return bench.Output(ctx, nil, append([]string{"ctr", "-a", e.socket}, args...)...)
}

func (e *containerd) pull(ctx context.Context, image string) error {
	_, err := e.run(ctx, "images", "pull", "--plain-http", image)
	return err
}

func (e *containerd) create(ctx context.Context, image string) (string, error) {
	e.made++
	id := fmt.Sprintf("c%d", e.made)
	_, err := e.run(ctx, "containers", "create", image, id, "true")
	return id, err
}

func (e *containerd) remove(ctx context.Context, id string) error {
	_, err := e.run(ctx, "containers", "rm", id)
	return err
}

func (e *containerd) removals() []removal {
	rm := func(args ...string) func(context.Context, string) error {
		return func(ctx context.Context, image string) error {
			_, err := e.run(ctx, append(append([]string{"images", "rm"}, args...), image)...)
			return err
		}
	}
	return []removal{{"ctr images rm", rm()}, {"ctr images rm --sync", rm("--sync")}}
}

func (e *containerd) trees() []string {
	return []string{filepath.Join(e.root, "io.containerd.snapshotter.v1.overlayfs/snapshots")}
}

// docker is dockerd, which is asked through its API.
type docker struct {
	root, host string
	client     *http.Client
}

func startDocker(ctx context.Context, b *trial, dir string) (engine, error) {
	socket := filepath.Join(dir, "sock")
	daemon, host := bench.Dockerd(dir)
	e := &docker{root: filepath.Join(dir, "root"), host: host}
	e.client = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
	return e, b.Start(ctx, daemon, func() error { return e.call(ctx, http.MethodGet, "/_ping", nil, nil) })
}

// call asks the daemon.
func (e *docker) call(ctx context.Context, method, path string, body, answer any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, bytes.NewReader(data))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := e.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err = io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, data)
	}
	if err == nil && answer != nil {
		err = json.Unmarshal(data, answer)
	}
	return err
}

func (e *docker) run(ctx context.Context, args ...string) (string, error) {
	return bench.Output(ctx, nil, append([]string{"docker", "-H", e.host}, args...)...)
}

func (e *docker) pull(ctx context.Context, image string) error {
	_, err := e.run(ctx, "pull", "-q", image)
	return err
}

func (e *docker) create(ctx context.Context, image string) (string, error) {
	var answer struct{ ID string }
	err := e.call(ctx, http.MethodPost, "/containers/create", map[string]any{
		"Image": image, "Cmd": []string{"true"}, "HostConfig": map[string]any{"NetworkMode": "none"},
	}, &answer)
	return answer.ID, err
}

func (e *docker) remove(ctx context.Context, id string) error {
	return e.call(ctx, http.MethodDelete, "/containers/"+id, nil, nil)
}

func (e *docker) removals() []removal {
	return []removal{{"docker rmi", func(ctx context.Context, image string) error {
		_, err := e.run(ctx, "rmi", image)
		return err
	}}}
}

func (e *docker) trees() []string { return []string{filepath.Join(e.root, "overlay2")} }
