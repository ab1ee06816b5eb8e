package layout

import (
	"fmt"
	"path"
	"strings"
)

// Names in the root of a store.
const (
	DatabaseFile  = "varve.db"
	LogFile       = "varve.log"        // what the database holds, once more; see [ChangeRecord]
	SuspectFile   = "varve.db.suspect" // asks the next opening to look at every page and record; how far the database was, and why
	DamagedFile   = "varve.db.damaged" // the last database that had to be replaced
	BlobsDir      = "blobs"
	IngestDir     = "ingest"
	LayersDir     = "layers"
	ActiveDir     = "active"
	StagingDir    = "staging"
	ContainersDir = "containers"
	VolumesDir    = "volumes"
	CacheMountDir = "cachemounts"
	TrashDir      = "trash"
	QuarantineDir = "quarantine"
)

// Dir is a directory that every store has from its creation on.
type Dir struct {
	Path    string
	Perm    uint32
	Meaning string
}

// Dirs returns every directory that creation makes, parents first. The 256
// shards of blobs are among them, so that publishing a blob never makes a
// directory.
func Dirs() []Dir {
	dirs := []Dir{
		{BlobsDir, 0o711, "blobs by digest, read-only"},
		{BlobsDir + "/sha256", 0o711, "one shard for each first byte of the digest"},
		{IngestDir, 0o700, "unfinished blobs, resumable"},
		{LayersDir, 0o711, "committed layer trees, each an overlay lower directory"},
		{ActiveDir, 0o711, "writable layers of containers and build steps"},
		{StagingDir, 0o700, "layer trees being unpacked, by boot"},
		{ContainersDir, 0o711, "configuration, logs and exit records of containers"},
		{VolumesDir, 0o711, "users' volumes"},
		{CacheMountDir, 0o711, "contents of RUN --mount=type=cache"},
		{TrashDir, 0o700, "renamed away, deleted in the background"},
		{QuarantineDir, 0o700, "what repairs took out of the store for being damaged; nothing deletes it but a user"},
	}
	for i := range 256 {
		dirs = append(dirs, Dir{fmt.Sprintf("%s/sha256/%02x", BlobsDir, i), 0o711, ""})
	}
	return dirs
}

// BlobPath is where the blob with this digest stands.
func BlobPath(d BlobDigest) string {
	hex := d.Hex()
	return path.Join(BlobsDir, "sha256", hex[:2], hex)
}

// IngestPath is the directory of an unfinished blob; see [IngestData] and
// [IngestInfo].
func IngestPath(id IngestID) string { return path.Join(IngestDir, string(id)) }

// Files of an ingest.
const (
	IngestData = "data" // the bytes so far
	IngestInfo = "info" // an [IngestRecord]
)

// LayerPath is the directory of a committed layer; its tree is [TreeDir].
func LayerPath(id LayerID) string { return path.Join(LayersDir, string(id)) }

// Directories of a layer or an active snapshot.
const (
	TreeDir = "fs"   // the tree: an overlay lower or upper directory
	WorkDir = "work" // overlay's work directory, beside an upper one
)

// ActivePath is the directory of a writable layer. Its id becomes the
// LayerID when it is committed.
func ActivePath(id LayerID) string { return path.Join(ActiveDir, string(id)) }

// StagingPath is where the layer id is unpacked during the boot with the given
// id (/proc/sys/kernel/random/boot_id).
func StagingPath(boot string, id LayerID) string { return path.Join(StagingDir, boot, string(id)) }

// ContainerPath is the directory of a container.
func ContainerPath(id ContainerID) string { return path.Join(ContainersDir, string(id)) }

// Files of a container's directory.
const (
	ContainerConfig = "config.json" // what the shim is to run
	ContainerImage  = "image.json"  // the config of its image, as it was then
	ContainerLock   = "lock"        // held (flock) while the shim lives
)

// QuarantinePath is the directory of one repair; see [QuarantineNote].
func QuarantinePath(id string) string { return path.Join(QuarantineDir, id) }

// QuarantineNote is the file in a repair's directory that says what was found
// where: a [QuarantineRecord].
const QuarantineNote = "note.json"

// CacheMountPath is where a cache mount stands. While it is filled with what it
// begins with, its name ends with [CacheMountBegun].
func CacheMountPath(key string) string { return path.Join(CacheMountDir, key) }

// CacheMountBegun is the end of the name of a cache mount that nobody uses yet.
const CacheMountBegun = ".new"

// NodePath is where the files of a node stand, or "" for a node that has none
// or whose identity cannot be the name of a file.
func NodePath(n Node) string {
	kind, id := n.Split()
	if kind == KindBlob {
		if d, err := ParseBlobDigest(id); err == nil {
			return BlobPath(d)
		}
		return ""
	}
	if !IsElement(id) {
		return ""
	}
	switch kind {
	case KindLayer:
		return LayerPath(LayerID(id))
	case KindActive:
		return ActivePath(LayerID(id))
	case KindContainer:
		return ContainerPath(ContainerID(id))
	case KindTrash:
		return TrashPath(id)
	case KindMount:
		return CacheMountPath(id)
	}
	return ""
}

// IsElement tells whether an identity can be the name of a file.
func IsElement(id string) bool {
	return id != "" && id != "." && id != ".." && !strings.ContainsAny(id, "/\x00")
}

// NewSweepID makes up an id for the sweep of a node. Those of one blob begin
// alike, so that whoever brings it again finds them: see [SweepPrefix].
func NewSweepID(n Node) string { return SweepPrefix(n) + NewID() }

// SweepPrefix begins the ids of the sweeps of a blob; "" for other nodes, whose
// files nobody else can have the name of.
func SweepPrefix(n Node) string {
	kind, id := n.Split()
	if d, err := ParseBlobDigest(id); kind == KindBlob && err == nil {
		return d.Hex()[:16] + "-"
	}
	return ""
}

// TrashPath is where something with a sweep row waits to be deleted.
func TrashPath(id string) string { return path.Join(TrashDir, id) }
