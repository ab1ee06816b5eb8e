package builder

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"github.com/moby/buildkit/session/sshforward"
	"github.com/moby/buildkit/util/gitutil"
	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
)

// gitRemote is what the source is called in commands.
const gitRemote = "origin"

// Variables of git's environment that secrets are in. A command line is there
// for all users of the host to read.
const (
	gitURLVar  = "VARVE_GIT_URL"
	gitAuthVar = "VARVE_GIT_AUTH"
)

// gitCommand runs git for one source, with what reaches the source.
type gitCommand struct {
	o       *gitOrigin
	cli     *gitutil.GitCLI
	env     []string
	secrets []string // that must not be seen
	undo    []func()
}

// command makes what git needs to reach the source. The caller ends it.
func (o *gitOrigin) command(ctx context.Context) (*gitCommand, error) {
	c := &gitCommand{o: o, secrets: credentials(o.remote), env: []string{
		"GIT_CEILING_DIRECTORIES=" + o.j.b.Scratch, // no repository but those that are named
		gitURLVar + "=" + o.remote,
	}}
	options, err := c.reach(ctx)
	if err != nil {
		c.end()
		return nil, err
	}
	c.cli = gitutil.NewGitCLI(append(options,
		gitutil.WithGitAdvice(o.advice), gitutil.WithExec(c.exec), gitutil.WithDir(o.j.b.Scratch),
		// Nothing of a repository is run, and nothing is left running.
		gitutil.WithArgs("-c", "core.hooksPath="+os.DevNull, "-c", "gc.auto=0", "-c", "maintenance.auto=false"),
	)...)
	return c, nil
}

// reach makes what authenticates the client to the source, and the source to
// git.
func (c *gitCommand) reach(ctx context.Context) (options []gitutil.Option, err error) {
	auth, err := c.o.authorization(ctx)
	if err != nil {
		return nil, err
	}
	if auth != "" {
		_, value, _ := strings.Cut(auth, " ")
		c.secrets = append(c.secrets, auth, value)
		c.env = append(c.env, gitAuthVar+"=Authorization: "+auth)
		options = append(options, gitutil.WithArgs("--config-env=http."+authScope(c.o.remote)+".extraheader="+gitAuthVar))
	}
	if c.o.agent != "" {
		socket, err := c.forward(ctx)
		if err != nil {
			return nil, err
		}
		options = append(options, gitutil.WithSSHAuthSock(socket))
	}
	if c.o.knownHosts != "" {
		file, err := c.file(c.o.knownHosts)
		if err != nil {
			return nil, err
		}
		options = append(options, gitutil.WithSSHKnownHosts(file))
	}
	return options, nil
}

func (c *gitCommand) end() {
	for _, fn := range c.undo {
		fn()
	}
}

// forward makes a socket that reaches the client's ssh agent.
func (c *gitCommand) forward(ctx context.Context) (string, error) {
	socket, closeSocket, err := c.o.j.agentSocket(ctx, sshforward.SocketOpt{ID: c.o.agent, UID: os.Geteuid(), GID: os.Getegid(), Mode: 0o700})
	if err != nil {
		return "", fmt.Errorf("source %s: %w", c.o.redacted(), err)
	}
	c.undo = append(c.undo, closeSocket)
	return socket, nil
}

func (c *gitCommand) file(data string) (string, error) {
	f, err := os.CreateTemp(c.o.j.b.Scratch, "hosts-")
	if err == nil {
		c.undo = append(c.undo, func() { _ = os.Remove(f.Name()) })
		_, err = f.WriteString(data)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return "", fmt.Errorf("source %s: known hosts: %w: %w", c.o.redacted(), err, errdefs.ErrUnavailable)
	}
	return f.Name(), nil
}

// authorization is the value of the HTTP header, from the first of the secrets
// that the client has: for the host before those for any.
func (o *gitOrigin) authorization(ctx context.Context) (string, error) {
	u, err := url.Parse(o.remote)
	if err != nil {
		return "", nil // as scp writes it: no HTTP
	}
	for _, suffix := range []string{"." + u.Host, ""} {
		for i, id := range []string{o.header, o.token} {
			if id == "" {
				continue
			}
			value, ok, err := o.j.secretData(ctx, id+suffix, true)
			switch {
			case err != nil:
				return "", fmt.Errorf("source %s: %w", o.redacted(), err)
			case ok && i == 0:
				return string(value), nil
			case ok:
				return "basic " + base64.StdEncoding.EncodeToString(append([]byte("x-access-token:"), value...)), nil
			}
		}
	}
	return "", nil
}

// authScope is where the header is sent. Submodules on GitHub are mostly read
// with the same token as what they are in.
func authScope(remote string) string {
	for _, host := range []string{"https://github.com/", "https://www.github.com/"} {
		if strings.HasPrefix(remote, host) {
			return host
		}
	}
	if u, err := url.Parse(remote); err == nil {
		u.User = nil
		return u.String()
	}
	return remote
}

// credentials are the parts of a URL that nobody is to see.
func credentials(remote string) (out []string) {
	u, err := url.Parse(remote)
	if err != nil || u.User == nil {
		return nil
	}
	out = append(out, u.User.String())
	if password, ok := u.User.Password(); ok && password != "" {
		_, escaped, _ := strings.Cut(u.User.String(), ":")
		return append(out, password, escaped)
	}
	if name := u.User.Username(); u.Scheme != "ssh" && name != "" {
		return append(out, name) // a token
	}
	return nil // the user of an ssh server
}

func (c *gitCommand) redact(s string) string {
	for _, secret := range c.secrets {
		if secret != "" {
			s = strings.ReplaceAll(s, secret, "xxxxx")
		}
	}
	return s
}

// run runs git and returns what it printed. what is what the command does, for
// its error.
func (c *gitCommand) run(ctx context.Context, what string, args ...string) (string, error) {
	out, err := c.cli.New(gitutil.WithStreams(c.streams)).Run(ctx, args...)
	if err == nil {
		return string(out), nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return "", fmt.Errorf("source %s: %s: %w", c.o.redacted(), what, cause)
	}
	return "", fmt.Errorf("source %s: failed to %s: %s: %w", c.o.redacted(), what, strings.TrimSpace(c.redact(err.Error())), errdefs.ErrUnavailable)
}

// remote runs git with the source as its remote.
func (c *gitCommand) remote(ctx context.Context, what string, args ...string) (string, error) {
	return c.with(gitutil.WithArgs("--config-env=remote."+gitRemote+".url="+gitURLVar)).run(ctx, what, args...)
}

// with is the same command with more options.
func (c *gitCommand) with(options ...gitutil.Option) *gitCommand {
	out := *c
	out.cli = c.cli.New(options...)
	return &out
}

// streams show what git says of its work, and not the data that it prints.
func (c *gitCommand) streams(context.Context) (stdout, stderr io.WriteCloser, flush func()) {
	return nopCloser{io.Discard}, &redactedLog{c: c}, func() {}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// redactedLog passes lines on, whole, so that no secret is cut in two.
type redactedLog struct {
	c    *gitCommand
	rest []byte
}

func (l *redactedLog) Write(p []byte) (int, error) {
	l.rest = append(l.rest, p...)
	if i := bytes.LastIndexAny(l.rest, "\r\n"); i >= 0 {
		l.send(l.rest[:i+1])
		l.rest = bytes.Clone(l.rest[i+1:])
	}
	return len(p), nil
}

func (l *redactedLog) Close() error {
	l.send(l.rest)
	l.rest = nil
	return nil
}

func (l *redactedLog) send(data []byte) {
	if len(data) > 0 {
		l.c.o.j.progress.log(l.c.o.v, 2, []byte(l.c.redact(string(data))))
	}
}

// exec runs the process, on a thread of its own that has the usual umask:
// git makes files by it. The thread ends with the process, which would be
// killed before that.
func (c *gitCommand) exec(ctx context.Context, cmd *exec.Cmd) error {
	cmd.Env = append(cmd.Env, c.env...)
	for i, v := range cmd.Env {
		if strings.HasPrefix(v, "GIT_SSH_COMMAND=") {
			// Only what the client gives: not the keys of whoever runs the
			// builder, and nothing into the list of hosts that he knows.
			cmd.Env[i] += " -o BatchMode=yes -o IdentityFile=none"
			if c.o.knownHosts == "" {
				cmd.Env[i] += " -o UserKnownHostsFile=" + os.DevNull
			}
		}
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			done <- err
			return
		}
		unix.Umask(0o022)
		done <- runGroup(ctx, cmd)
	}()
	return <-done
}

// killAfter is how long git has to end by itself when it is told to.
const killAfter = 10 * time.Second

// runGroup runs a process with those that it starts, and ends them together:
// git leaves the network to helpers.
func runGroup(ctx context.Context, cmd *exec.Cmd) error {
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGTERM}
	cmd.WaitDelay = killAfter // a helper may keep the output open
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-ended:
			return
		case <-ctx.Done():
		}
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGTERM)
		select {
		case <-ended:
		case <-time.After(killAfter):
			_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		}
	}()
	return cmd.Wait()
}
