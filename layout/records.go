package layout

import (
	"encoding/json"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FormatVersion is the number of the on-disk format that this code writes. A
// store with a higher number is refused; one with a lower is migrated.
const FormatVersion = 3

// Buckets of the database. All are top-level; keys are text. The sequence of
// each is the sum of its entries: see [EntrySum].
const (
	BucketMeta       = "meta"       // [MetaRecord] under the key "store"
	BucketBlobs      = "blobs"      // BlobDigest → [BlobRecord]
	BucketLayers     = "layers"     // LayerID → [LayerRecord]
	BucketLayerKeys  = "layerkeys"  // "diff:"+DiffID or "chain:"+ChainID → [LayerIDs]
	BucketSnapshots  = "snapshots"  // SnapshotKey → [SnapshotRecord]
	BucketImages     = "images"     // name → [ImageRecord]
	BucketContainers = "containers" // ContainerID → [ContainerRecord]
	BucketLeases     = "leases"     // LeaseID → [LeaseRecord]
	BucketCache      = "cache"      // cache key → [CacheRecord]
	BucketCacheByUse = "cachebyuse" // big-endian last use in ns + cache key → empty
	BucketEdges      = "edges"      // child, kind, parent → empty
	BucketEdgesBack  = "edgesback"  // parent, kind, child → empty
	BucketUses       = "uses"       // those of edges whose parent is in use → empty
	BucketMeasures   = "measures"   // path of a directory → [MeasureRecord]
	BucketIntents    = "intents"    // IntentID → [IntentRecord]
	BucketSweeps     = "sweeps"     // trash id → [SweepRecord]
	BucketLogTail    = "logtail"    // number of a change, 16 hex digits → [ChangeRecord]
)

// Buckets lists every bucket, for creation and for the check.
func Buckets() []string {
	return []string{
		BucketMeta, BucketBlobs, BucketLayers, BucketLayerKeys, BucketSnapshots,
		BucketImages, BucketContainers, BucketLeases, BucketCache,
		BucketCacheByUse, BucketEdges, BucketEdgesBack, BucketUses, BucketMeasures,
		BucketIntents, BucketSweeps, BucketLogTail,
	}
}

// KeysOnly lists the buckets whose values are empty.
func KeysOnly() []string {
	return []string{BucketEdges, BucketEdgesBack, BucketUses, BucketCacheByUse}
}

// Keys of BucketMeta.
const (
	MetaKey    = "store"   // [MetaRecord]
	StateKey   = "state"   // [StateRecord]
	RebuiltKey = "rebuilt" // [RebuiltRecord]; only if it ever was

	// [CheckRecord] of deep checks: the last one of the whole store that came
	// to its end; those that did not yet, asked for and in the background.
	CheckedKey   = "checked"
	CheckingKey  = "checking"
	ScrubbingKey = "scrubbing"
)

// MetaRecord says what the store is.
type MetaRecord struct {
	Format  int       `json:"format"`
	ID      string    `json:"id"` // random, for this store
	Created time.Time `json:"created"`
}

// StateRecord says how far the database has got. Every commit writes it.
type StateRecord struct {
	Commit uint64 `json:"commit"` // the number of that transaction
	Change uint64 `json:"change"` // number of the last [ChangeRecord]
	// Accounts are the records, added up.
	Accounts Accounts `json:"accounts,omitempty"`
}

// BlobRecord stands for a blob that is durable at [BlobPath].
type BlobRecord struct {
	Size    int64             `json:"size"`
	Created time.Time         `json:"created"`
	Updated time.Time         `json:"updated"`
	Labels  map[string]string `json:"labels,omitempty"`
	// Origins are repositories ("registry/name") that served the blob and
	// may serve it again, the newest last.
	Origins []string `json:"origins,omitempty"`
}

// LayerRecord stands for a tree that is durable and complete at [LayerPath].
type LayerRecord struct {
	// DiffID of the tar stream the tree was unpacked from; empty for a
	// tree that was committed and never exported.
	DiffID DiffID `json:"diffID,omitempty"`
	// ChainID is set when the tree took attributes or contents from its
	// parents while it was unpacked, and so belongs to that chain alone.
	ChainID  ChainID    `json:"chainID,omitempty"`
	Manifest BlobDigest `json:"manifest"` // what the tree must hold, file by file
	// Size is what the tree takes of the disk: the regular files in blocks
	// of 4 KiB, each inode once and holes as if they were written, and one
	// block for each directory. What a file system may need beside that is
	// not in it: more blocks of a large directory, one for a long link, for
	// xattrs, for a list of extents.
	Size    int64     `json:"size"`
	Inodes  int64     `json:"inodes"`
	Created time.Time `json:"created"`
	// Damaged is when a repair could not make the tree whole: it is not
	// used until a pull or a later repair has.
	Damaged time.Time `json:"damaged,omitzero"`
	// Export is the blob that the layer was last written as here; the blob
	// may be gone by now. ExportDiffID is its DiffID if that is not the
	// layer's: one that was pulled, and whose blob is gone, is written as
	// another stream of the same files.
	Export       *ocispec.Descriptor `json:"export,omitempty"`
	ExportDiffID DiffID              `json:"exportDiffID,omitempty"`
}

// LayerIDs are the layers that have one key. There is one, and it is written as
// such, but for steps of builds that made the same tree and learned so when
// they were exported.
type LayerIDs []LayerID

// MarshalJSON implements json.Marshaler.
func (ids LayerIDs) MarshalJSON() ([]byte, error) {
	if len(ids) == 1 {
		return json.Marshal(ids[0])
	}
	return json.Marshal([]LayerID(ids))
}

// UnmarshalJSON implements json.Unmarshaler.
func (ids *LayerIDs) UnmarshalJSON(data []byte) error {
	if len(data) > 0 && data[0] == '[' {
		return json.Unmarshal(data, (*[]LayerID)(ids))
	}
	*ids = make(LayerIDs, 1)
	return json.Unmarshal(data, &(*ids)[0])
}

// SnapshotKind tells what may be done with a snapshot.
type SnapshotKind string

// The kinds of snapshot, as containerd has them.
const (
	SnapshotView      SnapshotKind = "view"      // read-only, no directory of its own
	SnapshotActive    SnapshotKind = "active"    // writable, at ActivePath
	SnapshotCommitted SnapshotKind = "committed" // immutable, a layer's tree
)

// SnapshotRecord is a named place in a tree of layers.
type SnapshotRecord struct {
	Kind    SnapshotKind      `json:"kind"`
	Parent  SnapshotKey       `json:"parent,omitempty"` // a committed snapshot
	Layer   LayerID           `json:"layer,omitempty"`  // its tree: committed at LayerPath, else at ActivePath; a view on a parent has none
	Created time.Time         `json:"created"`
	Updated time.Time         `json:"updated"`
	Labels  map[string]string `json:"labels,omitempty"`
	Size    int64             `json:"size,omitempty"`   // committed: as the layer's
	Inodes  int64             `json:"inodes,omitempty"` // committed: as the layer's
}

// ImageRecord is a name that points to a manifest or an index.
type ImageRecord struct {
	Target  ocispec.Descriptor `json:"target"`
	Created time.Time          `json:"created"`
	Updated time.Time          `json:"updated"`
	Labels  map[string]string  `json:"labels,omitempty"`
	// Used is when it was last pulled, built on or run, more or less; zero:
	// not since Updated.
	Used time.Time `json:"used,omitzero"`
}

// LastUse is when the image was last used.
func (r ImageRecord) LastUse() time.Time {
	if r.Used.After(r.Updated) {
		return r.Used
	}
	return r.Updated
}

// ContainerRecord is a container whose directory is [ContainerPath].
type ContainerRecord struct {
	Name     string      `json:"name"`
	Image    string      `json:"image"`
	Snapshot SnapshotKey `json:"snapshot"`
	Created  time.Time   `json:"created"`
}

// LeaseRecord holds what an operation under way has found or made, by edges
// from it. A lease without expiry ends with the process that owns the store.
type LeaseRecord struct {
	Purpose string            `json:"purpose"`
	Created time.Time         `json:"created"`
	Expires time.Time         `json:"expires,omitzero"`
	Labels  map[string]string `json:"labels,omitempty"`
}

// CacheRecord is what the builder knows under one key.
type CacheRecord struct {
	// Alias is the key under which the same result is stored; the rest is
	// empty then.
	Alias string `json:"alias,omitempty"`
	// Snapshot is the result: a committed snapshot, one for each output of
	// the step.
	Snapshots []SnapshotKey `json:"snapshots,omitempty"`
	Size      int64         `json:"size"` // of the results alone, without what is below them
	Created   time.Time     `json:"created"`
	LastUse   time.Time     `json:"lastUse"`
	Uses      int64         `json:"uses"`
	// Took is how long the step ran: what is lost with the record.
	Took time.Duration `json:"took,omitempty"`
	// Description is for people: the step's name in the Dockerfile.
	Description string `json:"description,omitempty"`
	// Note is what a source's step keeps to ask by, the next time, whether the
	// result is still good.
	Note string `json:"note,omitempty"`
}

// IngestRecord is the file [IngestInfo] of an unfinished blob. It is synced
// with the data, from time to time: recovery drops an ingest without it, or
// with a torn one, and its download starts again. It drops one that is Private,
// too: nobody else goes on with it than the process that made it.
type IngestRecord struct {
	Ref      string            `json:"ref"`
	Expected BlobDigest        `json:"expected,omitempty"`
	Total    int64             `json:"total,omitempty"` // bytes; 0 when unknown
	Started  time.Time         `json:"started"`
	Labels   map[string]string `json:"labels,omitempty"`
	Private  bool              `json:"private,omitempty"`
}

// IntentRecord is a publication that is decided and may be half carried out.
// Everything it names is durable under its From name; recovery finishes it.
type IntentRecord struct {
	Created   time.Time      `json:"created"`
	Purpose   string         `json:"purpose"` // for people: "pull debian:12"
	Blobs     []BlobMove     `json:"blobs,omitempty"`
	Layers    []LayerMove    `json:"layers,omitempty"`
	Snapshots []SnapshotMake `json:"snapshots,omitempty"`
	Images    []ImageMake    `json:"images,omitempty"`
	Cache     []CacheMake    `json:"cache,omitempty"`
	Edges     []Edge         `json:"edges,omitempty"`
	// Gone are snapshot keys that cease to be: an active one that became
	// the committed one.
	Gone []SnapshotKey `json:"gone,omitempty"`
}

// BlobMove takes the file From (in an ingest or staging folder) to its digest.
type BlobMove struct {
	Digest BlobDigest `json:"digest"`
	From   string     `json:"from"`
	Record BlobRecord `json:"record"`
}

// LayerMove takes the directory From, which holds [TreeDir], to [LayerPath].
type LayerMove struct {
	ID     LayerID     `json:"id"`
	From   string      `json:"from"`
	Record LayerRecord `json:"record"`
}

// Taken returns the writable layer whose directory From is, if it is one.
func (m LayerMove) Taken() (Node, bool) {
	return ActiveNode(m.ID), m.From == ActivePath(m.ID)
}

// SnapshotMake records a snapshot.
type SnapshotMake struct {
	Key    SnapshotKey    `json:"key"`
	Record SnapshotRecord `json:"record"`
}

// ImageMake gives a name to an image, in place of what had it.
type ImageMake struct {
	Name   string      `json:"name"`
	Record ImageRecord `json:"record"`
}

// CacheMake stores a cache record under Key.
type CacheMake struct {
	Key    string      `json:"key"`
	Record CacheRecord `json:"record"`
}

// ChangeRecord is one line of the change log: what one commit changed of the
// records that outlive the process. Replayed from the first line, the log
// gives every record and edge of the database but for leases, intents, sweeps
// and what these hold. It is read when the database is lost.
//
// A line is the CRC-32C of the JSON that follows it, as 8 hex digits, a space,
// the JSON and a newline. Lines have consecutive numbers; only those of the
// beginning, which hold what there was when the log was last written anew,
// share one. A line is written when its commit is durable and synced some time
// later. Until then it stands in BucketLogTail too.
type ChangeRecord struct {
	Store   string   `json:"store,omitempty"` // the first line: the store's id
	Base    uint64   `json:"base,omitempty"`  // the first line: bytes of the beginning, about
	Seq     uint64   `json:"seq"`
	Changes []Change `json:"changes,omitempty"`
}

// Change is a record that was put or, without a value, deleted. An edge has
// the bucket BucketEdges, its key there, and the value true.
type Change struct {
	Bucket string          `json:"b"`
	Key    string          `json:"k"`
	Value  json.RawMessage `json:"v,omitempty"`
}

// LoggedBuckets are those whose changes go into the log.
func LoggedBuckets() []string {
	return []string{
		BucketBlobs, BucketLayers, BucketLayerKeys, BucketSnapshots, BucketImages, BucketContainers, BucketCache, BucketEdges,
	}
}

// LoggedEdge tells whether an edge goes into the log: not if it ends with an
// operation under way.
func LoggedEdge(e Edge) bool {
	kind, _ := e.Parent.Split()
	return kind != KindLease && kind != KindIntent
}

// RebuiltRecord says that the database was lost and made again.
type RebuiltRecord struct {
	When time.Time `json:"when"`
	Why  string    `json:"why"`
	// Records were taken over from the log. Lost are those whose files are
	// missing too, and those that no log tells of; Kept is what stands on
	// disk and no record names.
	Records int      `json:"records"`
	Lost    []string `json:"lost,omitempty"`
	Kept    []string `json:"kept,omitempty"`
}

// CheckRecord tells of a deep check. One that was cut off goes on from it: blobs
// are read in the order of their digests, then layers in that of their ids.
type CheckRecord struct {
	Started  time.Time `json:"started"`
	Finished time.Time `json:"finished,omitzero"` // zero: not yet
	// Of is what was chosen, as it was named; nothing for the whole store.
	Of []string `json:"of,omitempty"`
	// Sample is the share of the contents that is read, drawn by Draw; 0: all.
	Sample     float64 `json:"sample,omitempty"`
	Draw       uint64  `json:"draw,omitempty"`
	Background bool    `json:"background,omitempty"`

	Blob  BlobDigest `json:"blob,omitempty"`  // this and all before it are read
	Layer LayerID    `json:"layer,omitempty"` // the same
	Files int64      `json:"files,omitempty"` // names that were compared
	Bytes int64      `json:"bytes,omitempty"` // that were read
	Bad   []string   `json:"bad,omitempty"`   // objects with findings, to be read again

	// Of one that is finished: findings but for notices, those of them that
	// are losses, and those that were healed then.
	Findings int `json:"findings,omitempty"`
	Losses   int `json:"losses,omitempty"`
	Healed   int `json:"healed,omitempty"`
}

// QuarantineRecord is the note beside what a repair took out of its place, or
// was about to: names in the directory that are not what they were called for
// are good copies that a crash kept from their places.
type QuarantineRecord struct {
	When   time.Time         `json:"when"`
	Object string            `json:"object"`           // "layer 0123…", "blob sha256:…"
	Found  []string          `json:"found"`            // the findings
	Files  map[string]string `json:"files,omitempty"`  // name here → path in the store
	Images []string          `json:"images,omitempty"` // that stand on it
}

// SweepRecord is something whose record is gone and whose files have yet to
// go. Claimed is set, in a transaction of its own, before the files are
// renamed to the trash; until then a publication may take a blob back.
type SweepRecord struct {
	Path    string    `json:"path"` // where the files stood, relative to the root
	Node    Node      `json:"node"`
	Claimed bool      `json:"claimed"`
	Created time.Time `json:"created"`
	// What they take of the disk, as far as that was known.
	Bytes  int64 `json:"bytes,omitempty"`
	Inodes int64 `json:"inodes,omitempty"`
}
