package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/api/varve"
	"varve.dev/errdefs"
	"varve.dev/image"
)

// imagesFor returns the images with the caller's way to registries.
func (e *Engine) imagesFor(r varve.Registry, ref image.Ref) *image.Store {
	return e.images.With(image.NewRemotes(remoteOptions(r, ref)))
}

// remoteOptions are the caller's way to the registry of ref. The credentials
// are those of the docker config file of whoever has the store open, unless
// the caller sent some.
func remoteOptions(r varve.Registry, ref image.Ref) image.RemoteOptions {
	options := image.RemoteOptions{HostsDir: r.HostsDir, PlainHTTP: r.PlainHTTPHosts, Credentials: image.DockerCredentials("")}
	if r.PlainHTTP {
		options.PlainHTTP = append(options.PlainHTTP, ref.Domain())
	}
	if r.Auth != nil {
		auth := *r.Auth
		options.Credentials = func(context.Context, string) (string, string, error) {
			if auth.IdentityToken != "" {
				return "", auth.IdentityToken, nil
			}
			return auth.Username, auth.Password, nil
		}
	}
	return options
}

// platformOf reads what the caller wrote; nil stands for this machine's.
func platformOf(s string) (platforms.MatchComparer, error) {
	if s == "" {
		return nil, nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return nil, fmt.Errorf("platform %q: %w: %w", s, err, errdefs.ErrInvalidArgument)
	}
	return platforms.Only(p), nil
}

// forward turns image's progress into events, one at a time.
func forward(progress func(varve.Event)) image.Progress {
	if progress == nil {
		return nil
	}
	var mu sync.Mutex
	return func(e image.Event) {
		mu.Lock()
		defer mu.Unlock()
		progress(varve.Event{
			ID: e.Blob.String(), Name: e.Blob.Encoded()[:12], Phase: varve.Phase(e.Phase),
			Current: e.Bytes, Total: e.Total,
		})
	}
}

// Pull implements varve.Images.
func (e *Engine) Pull(ctx context.Context, req varve.PullRequest, progress func(varve.Event)) (varve.ImageSummary, error) {
	ref, err := image.ParseRef(req.Reference)
	if err != nil {
		return varve.ImageSummary{}, err
	}
	platform, err := platformOf(req.Platform)
	if err != nil {
		return varve.ImageSummary{}, err
	}
	var out varve.ImageSummary
	err = e.healing(ctx, req.Registry, func() error {
		pulled, err := e.imagesFor(req.Registry, ref).Pull(ctx, ref, image.PullOptions{Platform: platform, Progress: forward(progress)})
		if err != nil {
			return err
		}
		out = summaryOf(familiar(pulled.Name), pulled.Summary)
		d, err := e.images.Inspect(ctx, pulled.Name)
		if errors.Is(err, errdefs.ErrNotFound) {
			return nil // pulled, and since removed by somebody else
		}
		if err != nil {
			return err
		}
		return e.usable(ctx, d)
	})
	return out, err
}

func (e *Engine) summary(ctx context.Context, name string) (varve.ImageSummary, error) {
	d, err := e.images.Inspect(ctx, name)
	if err != nil {
		return varve.ImageSummary{}, err
	}
	return summaryOf(familiar(name), d.Summary), nil
}

// familiar is the short form of a full name.
func familiar(name string) string {
	if ref, err := image.ParseRef(name); err == nil {
		return ref.Familiar()
	}
	return name
}

func summaryOf(name string, s image.Summary) varve.ImageSummary {
	return varve.ImageSummary{
		Name: name, ID: s.ID.String(), Digest: s.Target.Digest.String(),
		Platform: platforms.Format(s.Platform), Created: s.Created, Size: s.Size,
	}
}

// Push implements varve.Images.
func (e *Engine) Push(ctx context.Context, req varve.PushRequest, progress func(varve.Event)) (varve.PushResult, error) {
	ref, err := image.ParseRef(req.Reference)
	if err != nil {
		return varve.PushResult{}, err
	}
	var desc ocispec.Descriptor
	err = e.healing(ctx, req.Registry, func() (err error) {
		desc, err = e.imagesFor(req.Registry, ref).Push(ctx, ref, image.PushOptions{Progress: forward(progress)})
		return err
	})
	return varve.PushResult{Digest: desc.Digest.String(), Size: desc.Size}, err
}

// Load implements varve.Images.
func (e *Engine) Load(ctx context.Context, archive io.Reader, progress func(varve.Event)) ([]varve.ImageSummary, error) {
	loaded, err := e.images.Load(ctx, archive, image.LoadOptions{Progress: forward(progress)})
	if err != nil {
		return nil, err
	}
	var out []varve.ImageSummary
	for _, l := range loaded {
		s, err := e.summary(ctx, l.Name)
		if errors.Is(err, errdefs.ErrNotFound) {
			continue // loaded, and since removed by somebody else
		}
		if err != nil {
			return out, err
		}
		out = append(out, s)
	}
	return out, nil
}

// Save implements varve.Images. What is written is a docker archive and an OCI
// layout at once.
func (e *Engine) Save(ctx context.Context, req varve.SaveRequest, w io.Writer) error {
	if len(req.Names) == 0 {
		return fmt.Errorf("save: no image is named: %w", errdefs.ErrInvalidArgument)
	}
	for _, name := range req.Names {
		err := e.healing(ctx, varve.Registry{}, func() error {
			d, err := e.images.Inspect(ctx, name)
			if err != nil {
				return err
			}
			return e.usable(ctx, d)
		})
		if err != nil {
			return err
		}
	}
	return e.images.Save(ctx, w, req.Names...)
}

// Tag implements varve.Images.
func (e *Engine) Tag(ctx context.Context, req varve.TagRequest) error {
	ref, err := image.ParseRef(req.Target)
	if err != nil {
		return err
	}
	return e.images.Tag(ctx, req.Source, ref)
}

// List implements varve.Images: a line for each name.
func (e *Engine) List(ctx context.Context) ([]varve.ImageSummary, error) {
	list, err := e.images.List(ctx)
	if err != nil {
		return nil, err
	}
	out := []varve.ImageSummary{}
	for _, s := range list {
		for _, name := range s.Names {
			out = append(out, summaryOf(familiar(name), s))
		}
	}
	return out, nil
}

// Remove implements varve.Images.
func (e *Engine) Remove(ctx context.Context, req varve.RemoveRequest) (varve.RemoveResult, error) {
	removed, err := e.images.Remove(ctx, req.Name, req.Force)
	if err != nil {
		return varve.RemoveResult{}, err
	}
	var out varve.RemoveResult
	for _, n := range removed.Untagged {
		out.Untagged = append(out.Untagged, familiar(n))
	}
	for _, d := range removed.Targets {
		out.Deleted = append(out.Deleted, d.String())
	}
	return out, nil
}

// Inspect implements varve.Images.
func (e *Engine) Inspect(ctx context.Context, name string) (json.RawMessage, error) {
	d, err := e.images.Inspect(ctx, name)
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(d.Docker())
	if err != nil {
		return nil, fmt.Errorf("inspect %s: %w: %w", name, err, errdefs.ErrInternal)
	}
	return data, nil
}

// History implements varve.Images.
func (e *Engine) History(ctx context.Context, name string) ([]varve.HistoryEntry, error) {
	steps, err := e.images.History(ctx, name)
	if err != nil {
		return nil, err
	}
	out := []varve.HistoryEntry{}
	for _, s := range steps {
		h := varve.HistoryEntry{CreatedBy: s.CreatedBy, Size: s.Size, Comment: s.Comment}
		if s.Created != nil {
			h.Created = *s.Created
		}
		out = append(out, h)
	}
	return out, nil
}
