package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"varve.dev/api/varve"
	"varve.dev/internal/testkit"
)

// errAbsent says that an engine is not installed.
var errAbsent = errors.New("not installed")

// engine keeps images and containers.
type engine interface {
	name() string
	// start runs it with its root in dir.
	start(ctx context.Context, dir string) error
	stop() error
	// load brings an image, unpacked, and returns its name.
	load(ctx context.Context, img testkit.Image) (string, error)
	// remove is what a user does; wait has it wait for the files where that can
	// be asked for.
	remove(ctx context.Context, image string, wait bool) error
	waits() bool // whether remove knows of wait
	// create makes a container and returns the directory that it writes to, and
	// how to remove it.
	create(ctx context.Context, image string) (upper string, remove func() error, err error)
	// usage asks what the disk holds; verbose, one by one.
	usage(ctx context.Context, verbose bool) error
}

// process is a daemon.
type process struct {
	dir string
	cmd *exec.Cmd
	log *os.File
}

func (p *process) run(dir, socket string, args ...string) error {
	if _, err := exec.LookPath(args[0]); err != nil {
		return errAbsent
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	p.dir, p.log = dir, log
	p.cmd = exec.Command(args[0], args[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial("unix", socket); err == nil {
			return c.Close()
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(log.Name())
			return fmt.Errorf("%s does not serve: %s", args[0], text)
		}
	}
}

func (p *process) stop() error {
	if p.cmd == nil || p.cmd.Process == nil {
		return nil
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	_ = p.cmd.Wait() // however it ends
	return p.log.Close()
}

// output runs a command that has to go well.
func output(ctx context.Context, in io.Reader, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin = in
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}

type varveEngine struct {
	process
	command string
	client  *varve.Client
}

func (e *varveEngine) name() string { return "varve" }

func (e *varveEngine) start(_ context.Context, dir string) error {
	socket := filepath.Join(dir, "state", "varve.sock")
	if err := e.run(dir, socket, e.command, "--root", filepath.Join(dir, "root"), "--state", filepath.Join(dir, "state"), "daemon"); err != nil {
		return err
	}
	e.client = varve.NewClient(socket)
	return nil
}

func (e *varveEngine) cli(ctx context.Context, in io.Reader, args ...string) error {
	_, err := output(ctx, in, append([]string{e.command, "--root", filepath.Join(e.dir, "root"), "--state", filepath.Join(e.dir, "state")}, args...)...)
	return err
}

func (e *varveEngine) load(ctx context.Context, img testkit.Image) (string, error) {
	archive := img.Archive()
	defer archive.Close()
	return img.Name, e.cli(ctx, archive, "load")
}

func (e *varveEngine) remove(ctx context.Context, image string, wait bool) error {
	err := e.cli(ctx, nil, "rmi", image)
	if err == nil && wait {
		err = e.cli(ctx, nil, "gc")
	}
	return err
}

func (e *varveEngine) waits() bool { return true }

func (e *varveEngine) create(ctx context.Context, image string) (string, func() error, error) {
	c, err := e.client.Create(ctx, varve.CreateRequest{Image: image, Command: []string{"true"}, Network: "none"}, nil)
	if err != nil {
		return "", nil, err
	}
	spec, err := os.ReadFile(filepath.Join(c.Dir, "config.json"))
	var config struct{ Rootfs struct{ Upper string } }
	if err == nil {
		err = json.Unmarshal(spec, &config)
	}
	return config.Rootfs.Upper, func() error { return e.client.RemoveContainer(ctx, c.ID) }, err
}

func (e *varveEngine) usage(ctx context.Context, verbose bool) error {
	args := []string{"df"}
	if verbose {
		args = append(args, "-v")
	}
	return e.cli(ctx, nil, args...)
}

type dockerEngine struct {
	process
	http     *http.Client
	registry *testkit.RegistryServer
}

func (e *dockerEngine) name() string { return "dockerd" }

func (e *dockerEngine) host() string { return filepath.Join(e.dir, "sock") }

func (e *dockerEngine) start(ctx context.Context, dir string) error {
	served := filepath.Join(dir, "registry")
	if err := os.Mkdir(served, 0o755); err != nil {
		return err
	}
	var err error
	if e.registry, err = testkit.StartRegistry(ctx, served, "127.0.0.1:0"); err != nil {
		return err
	}
	socket := filepath.Join(dir, "sock")
	err = e.run(dir, socket, "dockerd", "--data-root", filepath.Join(dir, "root"), "--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"),
		"--host", "unix://"+socket, "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=overlay2", "--cgroup-parent=varve-reclaim")
	e.http = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	return err
}

func (e *dockerEngine) stop() error {
	if e.registry != nil {
		e.registry.Stop()
	}
	return e.process.stop()
}

// call is a call of Docker's API.
func (e *dockerEngine) call(ctx context.Context, method, path string, body io.Reader, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := e.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, data)
	}
	if err == nil && into != nil {
		err = json.Unmarshal(data, into)
	}
	return err
}

func (e *dockerEngine) load(ctx context.Context, img testkit.Image) (string, error) {
	// It loads no OCI layout.
	if err := img.Push(e.registry.Addr, img.Name); err != nil {
		return "", err
	}
	name, tag, _ := strings.Cut(img.Name, ":")
	from := e.registry.Addr + "/" + name
	return from + ":" + tag, e.call(ctx, "POST", "/images/create?fromImage="+url.QueryEscape(from)+"&tag="+tag, nil, nil)
}

func (e *dockerEngine) remove(ctx context.Context, image string, _ bool) error {
	_, err := output(ctx, nil, "docker", "--host", "unix://"+e.host(), "rmi", image)
	return err
}

func (e *dockerEngine) waits() bool { return false }

func (e *dockerEngine) create(ctx context.Context, image string) (string, func() error, error) {
	var made struct{ ID string }
	err := e.call(ctx, "POST", "/containers/create", strings.NewReader(fmt.Sprintf(`{"Image":%q,"Cmd":["true"],"HostConfig":{"NetworkMode":"none"}}`, image)), &made)
	if err != nil {
		return "", nil, err
	}
	return "", func() error { return e.call(ctx, "DELETE", "/containers/"+made.ID, nil, nil) }, nil
}

// upper asks where a container writes to.
func (e *dockerEngine) upper(ctx context.Context) (dirs []string, err error) {
	var list []struct{ ID string }
	if err := e.call(ctx, "GET", "/containers/json?all=1", nil, &list); err != nil {
		return nil, err
	}
	for _, c := range list {
		var inspected struct {
			GraphDriver struct{ Data struct{ UpperDir string } }
		}
		if err := e.call(ctx, "GET", "/containers/"+c.ID+"/json", nil, &inspected); err != nil {
			return nil, err
		}
		dirs = append(dirs, inspected.GraphDriver.Data.UpperDir)
	}
	return dirs, nil
}

func (e *dockerEngine) usage(ctx context.Context, verbose bool) error {
	args := []string{"docker", "--host", "unix://" + e.host(), "system", "df"}
	if verbose {
		args = append(args, "-v")
	}
	_, err := output(ctx, nil, args...)
	return err
}

type containerdEngine struct {
	process
	made int
}

func (e *containerdEngine) name() string { return "containerd" }

func (e *containerdEngine) start(_ context.Context, dir string) error {
	config := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n", dir+"/root", dir+"/state", dir+"/sock")
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600); err != nil {
		return err
	}
	return e.run(dir, filepath.Join(dir, "sock"), "containerd", "--config", filepath.Join(dir, "config.toml"))
}

func (e *containerdEngine) ctr(ctx context.Context, in io.Reader, args ...string) (string, error) {
	return output(ctx, in, append([]string{"ctr", "--address", filepath.Join(e.dir, "sock")}, args...)...)
}

func (e *containerdEngine) load(ctx context.Context, img testkit.Image) (string, error) {
	archive := img.Archive()
	defer archive.Close()
	name := "docker.io/library/" + img.Name
	_, err := e.ctr(ctx, archive, "images", "import", "--index-name", name, "-")
	return name, err
}

func (e *containerdEngine) remove(ctx context.Context, image string, wait bool) error {
	args := []string{"images", "rm"}
	if wait {
		args = append(args, "--sync")
	}
	_, err := e.ctr(ctx, nil, append(args, image)...)
	return err
}

func (e *containerdEngine) waits() bool { return true }

func (e *containerdEngine) create(ctx context.Context, image string) (string, func() error, error) {
	e.made++
	id := fmt.Sprintf("c%d", e.made)
	_, err := e.ctr(ctx, nil, "containers", "create", image, id, "true")
	return "", func() error {
		_, err := e.ctr(ctx, nil, "containers", "rm", id)
		return err
	}, err
}

func (e *containerdEngine) usage(ctx context.Context, _ bool) error {
	_, err := e.ctr(ctx, nil, "snapshots", "usage")
	return err
}
