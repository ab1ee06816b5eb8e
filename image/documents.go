package image

import (
	"context"
	"errors"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// documents reads manifests and configs from the store or, where it has them
// not, from a repository, and keeps what it read: a pull asks for each once.
type documents struct {
	store  *Store
	repo   *Repository // nil: only the store
	cached map[digest.Digest][]byte
}

func newDocuments(s *Store, repo *Repository) *documents {
	return &documents{store: s, repo: repo, cached: map[digest.Digest][]byte{}}
}

// read is a blobReader. A document of the store that turns out damaged is
// fetched again if it can be.
func (d *documents) read(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if data, ok := d.cached[desc.Digest]; ok {
		return data, nil
	}
	data, err := d.store.blobs.ReadBlob(ctx, layout.BlobDigest(desc.Digest), limit)
	if d.repo != nil && (errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, errdefs.ErrDataLoss)) {
		data, err = d.repo.read(ctx, desc, limit)
	}
	if err != nil {
		return nil, err
	}
	d.cached[desc.Digest] = data
	return data, nil
}
