package varve

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"sync"
)

// Prefix begins the path of every call.
const Prefix = "/varve/v1/"

// stayCall is the call that lasts as long as a guest stays; see [Client.Stay].
const stayCall = "stay"

// IsStay tells whether a request is a new guest's.
func IsStay(r *http.Request) bool { return r.URL.Path == Prefix+stayCall }

// Handler answers the calls under [Prefix] from b.
func Handler(b Backend) http.Handler {
	mux := http.NewServeMux()
	handle(mux, "root", func(c *call, _ struct{}) (any, error) { return b.Root(c.ctx) })
	handle(mux, "info", func(c *call, _ struct{}) (any, error) { return b.Info(c.ctx) })
	handle(mux, "fsck", func(c *call, req FsckRequest) (any, error) { return b.Fsck(c.ctx, req, c.event) })
	handle(mux, "quarantine", func(c *call, _ struct{}) (any, error) { return b.Quarantine(c.ctx) })
	handle(mux, "discard", func(c *call, ids []string) (any, error) { return nil, b.Discard(c.ctx, ids) })
	handle(mux, "disk-usage", func(c *call, req DiskUsageRequest) (any, error) { return b.DiskUsage(c.ctx, req) })
	handle(mux, "collect", func(c *call, req CollectRequest) (any, error) { return b.Collect(c.ctx, req) })
	handle(mux, "prune", func(c *call, req PruneRequest) (any, error) { return b.Prune(c.ctx, req, c.event) })
	handle(mux, "pull", func(c *call, req PullRequest) (any, error) { return b.Pull(c.ctx, req, c.event) })
	handle(mux, "push", func(c *call, req PushRequest) (any, error) { return b.Push(c.ctx, req, c.event) })
	handle(mux, "load", func(c *call, _ struct{}) (any, error) { return b.Load(c.ctx, c.body, c.event) })
	handle(mux, "save", func(c *call, req SaveRequest) (any, error) { return nil, b.Save(c.ctx, req, c) })
	handle(mux, "tag", func(c *call, req TagRequest) (any, error) { return nil, b.Tag(c.ctx, req) })
	handle(mux, "list", func(c *call, _ struct{}) (any, error) { return b.List(c.ctx) })
	handle(mux, "remove", func(c *call, req RemoveRequest) (any, error) { return b.Remove(c.ctx, req) })
	handle(mux, "inspect", func(c *call, name string) (any, error) { return b.Inspect(c.ctx, name) })
	handle(mux, "history", func(c *call, name string) (any, error) { return b.History(c.ctx, name) })
	handle(mux, "create", func(c *call, req CreateRequest) (any, error) { return b.Create(c.ctx, req, c.event) })
	handle(mux, "commit", func(c *call, req CommitRequest) (any, error) { return b.Commit(c.ctx, req) })
	handle(mux, "remove-container", func(c *call, id string) (any, error) { return nil, b.RemoveContainer(c.ctx, id) })
	mux.HandleFunc("POST "+Prefix+stayCall, stay(b))
	return mux
}

// stay answers with the store's directory and then keeps the call open until
// the client goes: whoever serves the store in a command stays as long as it
// has guests.
func stay(b Backend) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c := &call{ctx: r.Context(), enc: json.NewEncoder(w), flush: http.NewResponseController(w).Flush}
		root, err := b.Root(c.ctx)
		if err != nil {
			c.send(frame{Error: encodeError(err)})
			return
		}
		raw, err := json.Marshal(root)
		if err != nil {
			c.send(frame{Error: encodeError(err)})
			return
		}
		c.send(frame{Result: raw})
		<-c.ctx.Done()
	}
}

// call is one request being answered.
type call struct {
	ctx  context.Context
	body io.Reader // what follows the request

	mu    sync.Mutex
	enc   *json.Encoder
	flush func() error
}

// handle registers one call.
func handle[Req any](mux *http.ServeMux, name string, fn func(*call, Req) (any, error)) {
	mux.HandleFunc("POST "+Prefix+name, func(w http.ResponseWriter, r *http.Request) {
		ctl := http.NewResponseController(w)
		// A client may send its build context while events come back. What
		// the call has not read of it makes the connection unfit for another.
		_ = ctl.EnableFullDuplex()
		if r.ContentLength < 0 {
			w.Header().Set("Connection", "close")
		}
		c := &call{ctx: r.Context(), enc: json.NewEncoder(w), flush: ctl.Flush}
		w.Header().Set("Content-Type", "application/x-ndjson")
		var req Req
		body, err := readRequest(r.Body, &req)
		if err != nil {
			c.send(frame{Error: encodeError(err)})
			return
		}
		c.body = body
		result, err := fn(c, req)
		if err == nil {
			var raw json.RawMessage
			if raw, err = json.Marshal(result); err == nil {
				c.send(frame{Result: raw})
				return
			}
		}
		c.send(frame{Error: encodeError(err)})
	})
}

// send writes one line. A client that went away is noticed by the request's
// context, so errors are of no use here.
func (c *call) send(f frame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.enc.Encode(f) == nil {
		_ = c.flush()
	}
}

func (c *call) event(e Event) { c.send(frame{Event: &e}) }

// Write sends a piece of output. It implements io.Writer for Save.
func (c *call) Write(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil // a frame of nothing says nothing
	}
	c.send(frame{Data: p})
	return len(p), nil
}
