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
	"path/filepath"
	"strings"

	"varve.dev/internal/testkit"
)

type dockerEngine struct {
	process
	http     *http.Client
	registry *testkit.RegistryServer
}

func (e *dockerEngine) name() string { return "dockerd" }

func (e *dockerEngine) socket() string { return filepath.Join(e.dir, "sock") }

func (e *dockerEngine) start(ctx context.Context, dir string) error {
	socket := filepath.Join(dir, "sock")
	err := e.run(ctx, dir, socket, "dockerd", "--data-root", filepath.Join(dir, "root"), "--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"),
		"--host", "unix://"+socket, "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=overlay2", "-l", "error")
	if err != nil {
		return err
	}
	e.http = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	// It listens before it serves.
	if err := e.call(ctx, http.MethodGet, "/_ping", nil, nil); err != nil {
		return err
	}
	served := filepath.Join(dir, "registry")
	if err := os.Mkdir(served, 0o755); err != nil {
		return err
	}
	e.registry, err = testkit.StartRegistry(ctx, served, "127.0.0.1:0")
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

// load pulls: it loads no OCI layout. A pull that fails says so in its answer's
// body, so the image is asked for.
func (e *dockerEngine) load(ctx context.Context, img testkit.Image) (string, error) {
	if err := img.Push(e.registry.Addr, img.Name); err != nil {
		return "", err
	}
	ref := e.registry.Ref(img.Name)
	name, tag, _ := strings.Cut(img.Name, ":")
	err := e.call(ctx, http.MethodPost, "/images/create?fromImage="+url.QueryEscape(e.registry.Ref(name))+"&tag="+tag, nil, nil)
	return ref, errors.Join(err, e.call(ctx, http.MethodGet, "/images/"+ref+"/json", nil, nil))
}

func (e *dockerEngine) removals() []removal {
	return []removal{{"rmi", func(ctx context.Context, image string) error {
		_, err := output(ctx, nil, "docker", "--host", "unix://"+e.socket(), "rmi", image)
		return err
	}}}
}

func (e *dockerEngine) create(ctx context.Context, image string) (func() error, error) {
	var made struct{ ID string }
	err := e.call(ctx, http.MethodPost, "/containers/create", strings.NewReader(fmt.Sprintf(`{"Image":%q,"Cmd":["true"],"HostConfig":{"NetworkMode":"none"}}`, image)), &made)
	return func() error { return e.call(ctx, http.MethodDelete, "/containers/"+made.ID, nil, nil) }, err
}

func (e *dockerEngine) uppers(ctx context.Context) (dirs []string, err error) {
	var list []struct{ ID string }
	if err := e.call(ctx, http.MethodGet, "/containers/json?all=1", nil, &list); err != nil {
		return nil, err
	}
	for _, c := range list {
		var inspected struct {
			GraphDriver struct{ Data struct{ UpperDir string } }
		}
		if err := e.call(ctx, http.MethodGet, "/containers/"+c.ID+"/json", nil, &inspected); err != nil {
			return nil, err
		}
		dirs = append(dirs, inspected.GraphDriver.Data.UpperDir)
	}
	return dirs, nil
}

func (e *dockerEngine) usage(ctx context.Context, verbose bool) error {
	args := []string{"docker", "--host", "unix://" + e.socket(), "system", "df"}
	if verbose {
		args = append(args, "-v")
	}
	_, err := output(ctx, nil, args...)
	return err
}
