package layout

import (
	"encoding/json"
	"maps"
	"path"
	"strings"
	"time"
)

// Usage is a number of things and what they take of the disk.
type Usage struct {
	Count  int64 `json:"count,omitempty"`
	Bytes  int64 `json:"bytes,omitempty"` // in blocks of 4 KiB, as [LayerRecord] counts them
	Inodes int64 `json:"inodes,omitempty"`
}

// Plus returns the sum.
func (u Usage) Plus(v Usage) Usage {
	return Usage{u.Count + v.Count, u.Bytes + v.Bytes, u.Inodes + v.Inodes}
}

// Minus returns the difference.
func (u Usage) Minus(v Usage) Usage {
	return Usage{u.Count - v.Count, u.Bytes - v.Bytes, u.Inodes - v.Inodes}
}

// Accounts are what the store holds, added up: see [AccountOf].
type Accounts map[string]Usage

// The accounts. Those of buckets have the buckets' names, those of directories
// the directories' after [AccountDir].
const (
	AccountBlobs      = BucketBlobs
	AccountLayers     = BucketLayers
	AccountSnapshots  = BucketSnapshots  // their number only: the trees are layers
	AccountImages     = BucketImages     // likewise
	AccountContainers = BucketContainers // likewise
	AccountCache      = BucketCache      // likewise
	AccountTrash      = BucketSweeps

	// Of the blobs and layers, those that are not in use: the build cache's
	// and what operations under way hold. See [Edge.Uses].
	AccountSpareBlobs  = "spare:blobs"
	AccountSpareLayers = "spare:layers"

	AccountDir = "dir:" // + ActiveDir, ContainersDir, …: what was measured, see [MeasureRecord]
)

// Add adds to an account. One that is empty is not there.
func (a Accounts) Add(name string, u Usage) {
	if u = a[name].Plus(u); u == (Usage{}) {
		delete(a, name)
	} else {
		a[name] = u
	}
}

// Clone returns a copy that is not nil.
func (a Accounts) Clone() Accounts {
	if a == nil {
		return Accounts{}
	}
	return maps.Clone(a)
}

// blockSize is the unit in which files take space.
const blockSize = 4096

// DirSize is what a directory is counted as.
const DirSize = blockSize

// OnDisk is what a file of so many bytes takes.
func OnDisk(size int64) int64 { return (size + blockSize - 1) / blockSize * blockSize }

// AccountOf returns the account that a record is part of, "" for none, and what
// it is there. body is the record's JSON; one that cannot be read counts as
// taking nothing.
func AccountOf(bucket, key string, body []byte) (string, Usage) {
	var rec struct {
		Size   int64 `json:"size"`
		Bytes  int64 `json:"bytes"`
		Inodes int64 `json:"inodes"`
	}
	switch bucket {
	case BucketSnapshots, BucketImages, BucketContainers, BucketCache:
		return bucket, Usage{Count: 1}
	case BucketBlobs, BucketLayers, BucketSweeps, BucketMeasures:
		_ = json.Unmarshal(body, &rec)
	}
	switch bucket {
	case BucketBlobs:
		return AccountBlobs, BlobUsage(BlobRecord{Size: rec.Size})
	case BucketLayers:
		return AccountLayers, LayerUsage(LayerRecord{Size: rec.Size, Inodes: rec.Inodes})
	case BucketSweeps:
		return AccountTrash, Usage{1, rec.Bytes, rec.Inodes}
	case BucketMeasures:
		return MeasureAccount(key), Usage{1, rec.Bytes, rec.Inodes}
	}
	return "", Usage{}
}

// MeasureAccount is the account of a directory that is measured, by its path.
func MeasureAccount(path string) string {
	dir, _, _ := strings.Cut(path, "/")
	return AccountDir + dir
}

// BlobUsage is what a blob takes of the disk.
func BlobUsage(rec BlobRecord) Usage { return Usage{1, OnDisk(rec.Size), 1} }

// LayerUsage is what a layer takes of the disk.
func LayerUsage(rec LayerRecord) Usage {
	return Usage{1, rec.Size + blockSize, rec.Inodes + 1} // with the layer's own directory
}

// SpareAccount is the account that counts, of one of blobs or layers, what is
// not in use; "" for the others.
func SpareAccount(account string) string {
	switch account {
	case AccountBlobs:
		return AccountSpareBlobs
	case AccountLayers:
		return AccountSpareLayers
	}
	return ""
}

// User tells whether a node is somebody's by itself: it uses what it needs, and
// so does that in turn. The build cache and operations under way do not: theirs
// is what may go, or is still on its way.
func (n Node) User() bool {
	switch kind, _ := n.Split(); kind {
	case KindImage, KindContainer, KindAPI:
		return true
	}
	return false
}

// MeasureRecord is what a directory took of the disk that containers or steps of
// builds write to, when somebody looked. Its key in BucketMeasures is the path.
type MeasureRecord struct {
	Bytes  int64     `json:"bytes"` // allocated, each inode once
	Inodes int64     `json:"inodes"`
	When   time.Time `json:"when"`
	// Running says that a container ran which may have changed it meanwhile.
	Running bool `json:"running,omitempty"`
}

// Measured lists the directories whose entries are measured.
func Measured() []string {
	return []string{ActiveDir, ContainersDir, VolumesDir, CacheMountDir, QuarantineDir}
}

// IsMeasured tells whether path can be the key of a measure.
func IsMeasured(key string) bool {
	dir, name := path.Split(key)
	for _, d := range Measured() {
		if dir == d+"/" {
			return IsElement(name)
		}
	}
	return false
}
