package varve

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
)

// ErrCutOff is the error of a call that was not answered to the end because
// who answered it has ended. It is an ErrUnavailable too.
var ErrCutOff = fmt.Errorf("the answer was cut off: %w", errdefs.ErrUnavailable)

// ErrReopened is the error of a call that came upon a damaged database, or was
// cut short because of it: the store is being opened again, which makes the
// database anew, and the call may be made once more. It is an ErrUnavailable
// too.
var ErrReopened = fmt.Errorf("the store's database is damaged and is being made anew: %w", errdefs.ErrUnavailable)

// Client is a [Backend] behind a unix socket.
type Client struct {
	http   *http.Client
	socket string
	pinned *os.File // the socket, whatever becomes of its name; nil without Stay
	leave  func()   // ends Stay; nil without
}

var _ Backend = (*Client)(nil)

// NewClient returns a client of the socket at the given path. It connects when
// it is first used.
func NewClient(socket string) *Client {
	c := &Client{socket: socket}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return c.Dial(ctx) },
		DisableCompression: true,
	}}
	return c
}

// Dial connects to the socket, for another protocol that it speaks.
func (c *Client) Dial(ctx context.Context) (net.Conn, error) {
	path := c.socket
	if c.pinned != nil {
		path = fmt.Sprintf("/proc/self/fd/%d", c.pinned.Fd())
	}
	var d net.Dialer
	return d.DialContext(ctx, "unix", path)
}

// Close ends the guest's stay and idle connections.
func (c *Client) Close() error {
	if c.leave != nil {
		c.leave()
	}
	c.http.CloseIdleConnections()
	if c.pinned == nil {
		return nil
	}
	return c.pinned.Close()
}

// Stay announces a guest, once, before any other call: until Close whoever
// serves the socket does not shut down by itself, and takes the guest's calls
// even when the socket's name is gone. It returns the directory of the store
// that is served there. Errors: ErrUnavailable.
func (c *Client) Stay(ctx context.Context) (root string, err error) {
	fd, err := unix.Open(c.socket, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("socket %s: %w: %w", c.socket, err, errdefs.ErrUnavailable)
	}
	c.pinned = os.NewFile(uintptr(fd), c.socket)
	stay, leave := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, leave) // until the answer is here
	body, err := c.open(stay, stayCall, struct{}{}, nil)
	if err == nil {
		if err = readAnswer(body, nil, nil, &root); err != nil {
			body.Close()
		}
	}
	stop()
	if err != nil {
		leave()
		return "", err
	}
	c.leave = func() { leave(); body.Close() }
	return root, nil
}

// do makes one call. Output goes to out, which may be nil for a call that has
// none; result may be nil.
func (c *Client) do(ctx context.Context, name string, req any, send io.Reader, progress func(Event), out io.Writer, result any) error {
	body, err := c.open(ctx, name, req, send)
	if err != nil {
		return err
	}
	defer body.Close()
	err = readAnswer(body, progress, out, result)
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// open sends a request and returns the answer's body.
func (c *Client) open(ctx context.Context, name string, req any, send io.Reader) (io.ReadCloser, error) {
	line, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInternal)
	}
	var all io.Reader = bytes.NewReader(append(line, '\n'))
	if send != nil {
		all = io.MultiReader(all, send)
	}
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://varve"+Prefix+name, all)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInternal)
	}
	resp, err := c.http.Do(hr)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		kind := error(errdefs.ErrUnavailable)
		if c.leave != nil {
			kind = ErrCutOff // it was there a moment ago
		}
		return nil, fmt.Errorf("%s through %s: %w: %w", name, c.socket, kind, err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return nil, fmt.Errorf("%s through %s: %s: %s: %w", name, c.socket, resp.Status, bytes.TrimSpace(text), errdefs.ErrUnavailable)
	}
	return resp.Body, nil
}

// readAnswer reads lines until the result or the error.
func readAnswer(r io.Reader, progress func(Event), out io.Writer, result any) error {
	dec := json.NewDecoder(bufio.NewReaderSize(r, 64<<10))
	for {
		var f frame
		if err := dec.Decode(&f); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("%w: %w", ErrCutOff, err)
		}
		switch {
		case f.Error != nil:
			return f.Error.decode()
		case f.Event != nil:
			if progress != nil {
				progress(*f.Event)
			}
		case f.Data != nil:
			if out == nil {
				continue
			}
			if _, err := out.Write(f.Data); err != nil {
				return fmt.Errorf("write output: %w: %w", err, errdefs.ErrUnavailable)
			}
		case len(f.Result) == 0:
			return fmt.Errorf("an answer that says nothing: %w", errdefs.ErrInternal)
		default:
			if result == nil {
				return nil
			}
			if err := json.Unmarshal(f.Result, result); err != nil {
				return fmt.Errorf("result: %w: %w", err, errdefs.ErrInternal)
			}
			return nil
		}
	}
}

// Root implements [Backend].
func (c *Client) Root(ctx context.Context) (r string, err error) {
	err = c.do(ctx, "root", struct{}{}, nil, nil, nil, &r)
	return r, err
}

// Info implements [Backend].
func (c *Client) Info(ctx context.Context) (r Info, err error) {
	err = c.do(ctx, "info", struct{}{}, nil, nil, nil, &r)
	return r, err
}

// Fsck implements [Backend].
func (c *Client) Fsck(ctx context.Context, req FsckRequest, progress func(Event)) (r FsckReport, err error) {
	err = c.do(ctx, "fsck", req, nil, progress, nil, &r)
	return r, err
}

// Quarantine implements [Backend].
func (c *Client) Quarantine(ctx context.Context) (r []Quarantined, err error) {
	err = c.do(ctx, "quarantine", struct{}{}, nil, nil, nil, &r)
	return r, err
}

// Discard implements [Backend].
func (c *Client) Discard(ctx context.Context, ids []string) error {
	return c.do(ctx, "discard", ids, nil, nil, nil, nil)
}

// DiskUsage implements [Space].
func (c *Client) DiskUsage(ctx context.Context, req DiskUsageRequest) (r DiskUsage, err error) {
	err = c.do(ctx, "disk-usage", req, nil, nil, nil, &r)
	return r, err
}

// Collect implements [Space].
func (c *Client) Collect(ctx context.Context, req CollectRequest) (r Collected, err error) {
	err = c.do(ctx, "collect", req, nil, nil, nil, &r)
	return r, err
}

// Prune implements [Space].
func (c *Client) Prune(ctx context.Context, req PruneRequest, progress func(Event)) (r Pruned, err error) {
	err = c.do(ctx, "prune", req, nil, progress, nil, &r)
	return r, err
}

// Pull implements [Images].
func (c *Client) Pull(ctx context.Context, req PullRequest, progress func(Event)) (r ImageSummary, err error) {
	err = c.do(ctx, "pull", req, nil, progress, nil, &r)
	return r, err
}

// Push implements [Images].
func (c *Client) Push(ctx context.Context, req PushRequest, progress func(Event)) (r PushResult, err error) {
	err = c.do(ctx, "push", req, nil, progress, nil, &r)
	return r, err
}

// Load implements [Images].
func (c *Client) Load(ctx context.Context, archive io.Reader, progress func(Event)) (r []ImageSummary, err error) {
	err = c.do(ctx, "load", struct{}{}, archive, progress, nil, &r)
	return r, err
}

// Save implements [Images].
func (c *Client) Save(ctx context.Context, req SaveRequest, w io.Writer) error {
	return c.do(ctx, "save", req, nil, nil, w, nil)
}

// Tag implements [Images].
func (c *Client) Tag(ctx context.Context, req TagRequest) error {
	return c.do(ctx, "tag", req, nil, nil, nil, nil)
}

// List implements [Images].
func (c *Client) List(ctx context.Context) (r []ImageSummary, err error) {
	err = c.do(ctx, "list", struct{}{}, nil, nil, nil, &r)
	return r, err
}

// Remove implements [Images].
func (c *Client) Remove(ctx context.Context, req RemoveRequest) (r RemoveResult, err error) {
	err = c.do(ctx, "remove", req, nil, nil, nil, &r)
	return r, err
}

// Inspect implements [Images].
func (c *Client) Inspect(ctx context.Context, name string) (r json.RawMessage, err error) {
	err = c.do(ctx, "inspect", name, nil, nil, nil, &r)
	return r, err
}

// History implements [Images].
func (c *Client) History(ctx context.Context, name string) (r []HistoryEntry, err error) {
	err = c.do(ctx, "history", name, nil, nil, nil, &r)
	return r, err
}

// Create implements [Containers].
func (c *Client) Create(ctx context.Context, req CreateRequest, progress func(Event)) (r Container, err error) {
	err = c.do(ctx, "create", req, nil, progress, nil, &r)
	return r, err
}

// Commit implements [Containers].
func (c *Client) Commit(ctx context.Context, req CommitRequest) (r ImageSummary, err error) {
	err = c.do(ctx, "commit", req, nil, nil, nil, &r)
	return r, err
}

// RemoveContainer implements [Containers].
func (c *Client) RemoveContainer(ctx context.Context, id string) error {
	return c.do(ctx, "remove-container", id, nil, nil, nil, nil)
}
