package image

import (
	"context"
	"io"

	"github.com/containerd/platforms"

	"varve.dev/content"
	"varve.dev/durable"
	"varve.dev/internal/budget"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// Store is the images of one open store.
type Store struct {
	root     *durable.Root
	db       *metadata.DB
	journal  *journal.Journal
	blobs    *content.Store
	unpacker Unpacker
	remotes  *Remotes
	space    *budget.Budget
	turns    turns
}

// Config is what a Store stands on. All of it outlives the Store.
type Config struct {
	Root    *durable.Root
	DB      *metadata.DB
	Journal *journal.Journal
	Blobs   *content.Store
	// Unpacker makes trees of layers; nil keeps images as blobs only.
	Unpacker Unpacker
	Remotes  *Remotes
	// Space is asked, before layers are brought, whether they can fit; nil if
	// there are no limits.
	Space *budget.Budget
}

// New returns the images of the store that c belongs to.
func New(c Config) *Store {
	return &Store{root: c.Root, db: c.DB, journal: c.Journal, blobs: c.Blobs, unpacker: c.Unpacker, remotes: c.Remotes, space: c.Space, turns: newTurns()}
}

// With returns the same images with another way to registries: one caller's
// plain HTTP or credentials. Operations on both take turns together.
func (s *Store) With(remotes *Remotes) *Store {
	other := *s
	other.remotes = remotes
	return &other
}

// Unpacker makes layer trees. Package snapshotter has one.
type Unpacker interface {
	// Begin prepares to unpack an image whose layers have these DiffIDs, the
	// bottom one first. What of them stands already is linked to the lease
	// and so stays. The files of the new trees go into barrier.
	Begin(ctx context.Context, lease *metadata.Lease, chain []layout.DiffID, barrier *durable.Barrier) (Unpack, error)
}

// Unpack is one image's layers on their way from tar streams to trees. It
// ends with Finish and the publication, or with Abandon.
type Unpack interface {
	// Missing tells for each layer whether it has to be unpacked.
	Missing() []bool
	// Layer unpacks layer i of the chain from its uncompressed tar stream,
	// without looking at the layers below. It may run for several layers at
	// once, and again for the same one after an error. It reads the stream
	// to its end, also what follows the archive, and compares all of it with
	// the chain's DiffID: ErrFailedPrecondition, naming both.
	Layer(ctx context.Context, i int, tar io.Reader) error
	// Finish completes the trees in order, from the bottom, and adds what
	// has to be published to in. It returns the snapshot of the whole chain.
	Finish(ctx context.Context, in *layout.IntentRecord) (layout.SnapshotKey, error)
	// Abandon throws away what was unpacked. After a publication it does
	// nothing.
	Abandon()
}

// hostPlatform is the default for pull and load: what this machine runs.
func hostPlatform() platforms.MatchComparer { return platforms.Default() }
