package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Foreign is somebody else's store of images: an OCI layout of a build's client,
// for example.
type Foreign struct {
	Name  string // for people
	Store content.InfoReaderProvider
}

// Describe returns the descriptor of a manifest or an index by its digest. Errors:
// ErrNotFound; ErrInvalidArgument for what is neither.
func (f Foreign) Describe(ctx context.Context, d digest.Digest) (desc ocispec.Descriptor, err error) {
	info, err := f.Store.Info(ctx, d)
	if err != nil {
		return desc, fmt.Errorf("%s has no %s: %w: %w", f.Name, d, err, errdefs.ErrNotFound)
	}
	desc = ocispec.Descriptor{Digest: d, Size: info.Size}
	var doc struct {
		MediaType string            `json:"mediaType"`
		Config    *struct{}         `json:"config"`
		Manifests []json.RawMessage `json:"manifests"`
	}
	if err := readJSON(ctx, f.repository().read, desc, maxManifest, &doc); err != nil {
		return desc, err
	}
	switch {
	case doc.MediaType != "":
		desc.MediaType = doc.MediaType
	case doc.Config != nil:
		desc.MediaType = ocispec.MediaTypeImageManifest
	case doc.Manifests != nil:
		desc.MediaType = ocispec.MediaTypeImageIndex
	default:
		return desc, fmt.Errorf("%s of %s is neither an index nor a manifest: %w", d, f.Name, errdefs.ErrInvalidArgument)
	}
	return desc, nil
}

func (f Foreign) repository() *Repository {
	fetch := remotes.FetcherFunc(func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
		r, err := f.Store.ReaderAt(ctx, desc)
		if err != nil {
			return nil, err
		}
		return struct {
			*io.SectionReader
			io.Closer
		}{io.NewSectionReader(r, 0, r.Size()), r}, nil
	})
	return &Repository{name: f.Name, fetcher: fetch, patience: Patience{Attempts: 1, Answer: DefaultPatience().Answer, Silence: DefaultPatience().Silence, Total: DefaultPatience().Total}}
}

// ResolveIn is [Store.Resolve] for an image of somebody else's store.
func (s *Store) ResolveIn(ctx context.Context, from Foreign, d digest.Digest, platform platforms.MatchComparer) (Resolved, error) {
	target, err := from.Describe(ctx, d)
	if err != nil {
		return Resolved{}, err
	}
	r, err := resolved(ctx, newDocuments(s, from.repository()), target, platform)
	if err != nil {
		return Resolved{}, fmt.Errorf("resolve %s in %s: %w", d, from.Name, err)
	}
	return r, nil
}

// PullFrom brings an image of somebody else's store and unpacks it, as [Store.Pull]
// does. It gets no name: it stays as long as holder, or whatever else refers to
// it, does.
func (s *Store) PullFrom(ctx context.Context, from Foreign, d digest.Digest, holder layout.Node, options PullOptions) (layout.SnapshotKey, error) {
	if options.Parallel <= 0 {
		options.Parallel = defaultParallel
	}
	if options.Platform == nil {
		options.Platform = hostPlatform()
	}
	target, err := from.Describe(ctx, d)
	if err != nil {
		return "", err
	}
	pulled, err := s.pull(ctx, wanted{familiar: from.Name + "@" + d.String(), target: target, holder: holder}, from.repository(), options)
	if err != nil {
		return "", err
	}
	p, err := pick(ctx, newDocuments(s, nil).read, pulled.Target, options.Platform)
	if err != nil {
		return "", err
	}
	return s.snapshotOf(ctx, p.manifest)
}

// Origin is the repository of ref as a store of somebody else's, and what ref
// stands for there.
func (s *Store) Origin(ctx context.Context, ref Ref) (Foreign, ocispec.Descriptor, error) {
	target, err := s.target(ctx, ref)
	if err != nil {
		return Foreign{}, target, err
	}
	repo, err := s.remotes.Repository(ctx, ref)
	return Foreign{Name: ref.Familiar(), Store: &repositoryStore{repo: repo}}, target, err
}

// repositoryStore reads a repository as a content store; it has nothing else of
// one.
type repositoryStore struct{ repo *Repository }

func (s *repositoryStore) Info(_ context.Context, d digest.Digest) (content.Info, error) {
	return content.Info{}, fmt.Errorf("a registry does not tell the size of %s alone: %w", d, errdefs.ErrNotImplemented)
}

func (s *repositoryStore) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	return &streamAt{ctx: ctx, repo: s.repo, desc: desc}, nil
}

// streamAt reads a blob of a repository from offsets that follow one another; from
// another one it begins anew.
type streamAt struct {
	ctx  context.Context
	repo *Repository
	desc ocispec.Descriptor
	at   int64
	body io.ReadCloser
}

func (s *streamAt) Size() int64 { return s.desc.Size }

func (s *streamAt) ReadAt(p []byte, off int64) (int, error) {
	if s.body != nil && off != s.at {
		s.body.Close()
		s.body = nil
	}
	if s.body == nil {
		s.body, s.at = s.repo.Open(s.ctx, s.desc, off), off
	}
	n, err := io.ReadFull(s.body, p)
	s.at += int64(n)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = io.EOF
	}
	return n, err
}

func (s *streamAt) Close() error {
	if s.body == nil {
		return nil
	}
	return s.body.Close()
}
