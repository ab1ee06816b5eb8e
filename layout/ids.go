package layout

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"

	"varve.dev/errdefs"
)

// The identities of the store. They are distinct types so that mixing them
// does not compile.
type (
	// BlobDigest names a blob by the sha256 of its bytes as stored,
	// compressed or not: "sha256:<64 hex>".
	BlobDigest string
	// DiffID names a layer by the sha256 of its uncompressed tar stream
	// (OCI image-spec, config.md, "Layer DiffID").
	DiffID string
	// ChainID names a layer together with all below it (OCI image-spec,
	// config.md, "Layer ChainID").
	ChainID string
	// LayerID names the directory of a committed layer tree. Random, never
	// used again.
	LayerID string
	// SnapshotKey is the caller's name for a snapshot.
	SnapshotKey string
	// IntentID names a row of the journal.
	IntentID string
	// IngestID names the directory of an unfinished blob.
	IngestID string
	// LeaseID names what holds things for an operation that is under way.
	LeaseID string
	// ContainerID names a container: 64 hex digits.
	ContainerID string
)

// Algorithm is the one digest algorithm of the store.
const Algorithm = digest.SHA256

// ParseBlobDigest checks that s is "sha256:" and 64 lower-case hex digits.
func ParseBlobDigest(s string) (BlobDigest, error) {
	d := digest.Digest(s)
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("digest %q: %w: %w", s, err, errdefs.ErrInvalidArgument)
	}
	if d.Algorithm() != Algorithm {
		return "", fmt.Errorf("digest %q: algorithm %s is not supported, only %s: %w",
			s, d.Algorithm(), Algorithm, errdefs.ErrInvalidArgument)
	}
	return BlobDigest(s), nil
}

// Hex returns the digits after "sha256:".
func (d BlobDigest) Hex() string { return strings.TrimPrefix(string(d), string(Algorithm)+":") }

// Digest returns d in the type that the OCI libraries use.
func (d BlobDigest) Digest() digest.Digest { return digest.Digest(d) }

// NewID returns 24 random hex digits, for a [LayerID], [IntentID] or
// [LeaseID]. 96 bits never meet by chance, and 128 layers with longer names
// would not fit into the page that mount(2) has for its options.
func NewID() string {
	var b [12]byte
	rand.Read(b[:]) // never fails; see crypto/rand
	return hex.EncodeToString(b[:])
}

// IngestFor returns the directory name of the ingest with the caller's
// reference ref, which may be any text.
func IngestFor(ref string) IngestID {
	return IngestID(digest.FromString(ref).Encoded()[:32])
}
