package layout

import (
	"fmt"
	"strings"

	"varve.dev/errdefs"
)

// Node is one end of a reference: a kind and an identity, "blob:sha256:…".
type Node string

// The kinds of node.
const (
	KindBlob      = "blob"
	KindLayer     = "layer"
	KindActive    = "active" // the directory of a writable layer; it has no record of its own
	KindSnapshot  = "snapshot"
	KindImage     = "image"
	KindContainer = "container"
	KindLease     = "lease"
	KindCache     = "cache"
	KindIntent    = "intent"
	KindAPI       = "api"
	KindMount     = "mount" // a cache mount's directory; it has no record, and no edges
	KindTrash     = "trash" // what has been moved to the trash, whose name is another's by now; likewise
)

// Constructors of nodes.
func BlobNode(d BlobDigest) Node       { return Node(KindBlob + ":" + string(d)) }
func LayerNode(id LayerID) Node        { return Node(KindLayer + ":" + string(id)) }
func ActiveNode(id LayerID) Node       { return Node(KindActive + ":" + string(id)) }
func SnapshotNode(k SnapshotKey) Node  { return Node(KindSnapshot + ":" + string(k)) }
func ImageNode(name string) Node       { return Node(KindImage + ":" + name) }
func ContainerNode(c ContainerID) Node { return Node(KindContainer + ":" + string(c)) }
func LeaseNode(id LeaseID) Node        { return Node(KindLease + ":" + string(id)) }
func CacheNode(key string) Node        { return Node(KindCache + ":" + key) }
func IntentNode(id IntentID) Node      { return Node(KindIntent + ":" + string(id)) }
func TrashNode(id string) Node         { return Node(KindTrash + ":" + id) }
func MountNode(key string) Node        { return Node(KindMount + ":" + key) }

// ContainerdNode is the root that holds whatever came in through containerd's
// API until its Delete.
const ContainerdNode = Node(KindAPI + ":containerd")

// Split returns the kind and the identity.
func (n Node) Split() (kind, id string) {
	kind, id, _ = strings.Cut(string(n), ":")
	return kind, id
}

// Root tells whether a node is alive without anybody referring to it. What is
// not a root goes in the transaction that takes its last reference.
func (n Node) Root() bool {
	switch kind, _ := n.Split(); kind {
	case KindImage, KindContainer, KindLease, KindCache, KindIntent, KindAPI:
		return true
	}
	return false
}

// The relations, read parent → child.
const (
	RelTarget   = "target"   // image → manifest or index blob
	RelContent  = "content"  // index → manifest, manifest → config and layer blobs
	RelUnpacked = "unpacked" // manifest blob → the snapshot of its whole chain
	RelParent   = "parent"   // snapshot → the snapshot below it
	RelTree     = "tree"     // committed snapshot → layer, active snapshot → its directory (KindActive)
	RelFiles    = "files"    // layer → its file manifest blob
	RelHolds    = "holds"    // lease, intent or api → anything
	RelRootfs   = "rootfs"   // container → its active snapshot
	RelResult   = "result"   // cache record → snapshot
)

// Edge says that Parent needs Child.
type Edge struct {
	Parent Node   `json:"parent"`
	Rel    string `json:"rel"`
	Child  Node   `json:"child"`
}

// edgeSeparator cannot occur in a node: identities with a NUL are refused.
const edgeSeparator = "\x00"

// Key is the edge's key in BucketEdges, child first: "who refers to this
// child" is one prefix.
func (e Edge) Key() []byte {
	return []byte(string(e.Child) + edgeSeparator + e.Rel + edgeSeparator + string(e.Parent))
}

// BackKey is the edge's key in BucketEdgesBack, parent first.
func (e Edge) BackKey() []byte {
	return []byte(string(e.Parent) + edgeSeparator + e.Rel + edgeSeparator + string(e.Child))
}

// NodePrefix begins every key of an edge whose first end is n.
func NodePrefix(n Node) []byte { return []byte(string(n) + edgeSeparator) }

// RelationPrefix begins every key of an edge of one relation whose first end is
// n.
func RelationPrefix(n Node, rel string) []byte {
	return []byte(string(n) + edgeSeparator + rel + edgeSeparator)
}

// ParseEdge reads a key of BucketEdges.
func ParseEdge(key []byte) (Edge, error) {
	first, rel, last, err := cutKey(key)
	return Edge{Parent: last, Rel: rel, Child: first}, err
}

// ParseBackEdge reads a key of BucketEdgesBack.
func ParseBackEdge(key []byte) (Edge, error) {
	first, rel, last, err := cutKey(key)
	return Edge{Parent: first, Rel: rel, Child: last}, err
}

func cutKey(key []byte) (first Node, rel string, last Node, err error) {
	parts := strings.Split(string(key), edgeSeparator)
	if len(parts) != 3 {
		return "", "", "", fmt.Errorf("edge key %q has %d parts, not 3: %w", key, len(parts), errdefs.ErrDataLoss)
	}
	return Node(parts[0]), parts[1], Node(parts[2]), nil
}

// CheckName refuses text that cannot be part of a key.
func CheckName(what, s string) error {
	if s == "" {
		return fmt.Errorf("%s is empty: %w", what, errdefs.ErrInvalidArgument)
	}
	if strings.Contains(s, edgeSeparator) {
		return fmt.Errorf("%s %q contains a NUL: %w", what, s, errdefs.ErrInvalidArgument)
	}
	if len(s) > maxName {
		return fmt.Errorf("%s is %d bytes long, more than %d: %w", what, len(s), maxName, errdefs.ErrInvalidArgument)
	}
	return nil
}

// maxName keeps an edge of two names within bbolt's key limit of 32,768 bytes.
const maxName = 8192

// DiffKey and ChainKey are the keys of BucketLayerKeys.
func DiffKey(d DiffID) string   { return "diff:" + string(d) }
func ChainKey(c ChainID) string { return "chain:" + string(c) }

// Key returns the record's key in BucketLayerKeys, or "" for a tree that has
// no DiffID and so cannot be found by content.
func (r LayerRecord) Key() string {
	switch {
	case r.ChainID != "":
		return ChainKey(r.ChainID)
	case r.DiffID != "":
		return DiffKey(r.DiffID)
	}
	return ""
}

// RecordTells tells whether the record of an edge's parent calls for a relation
// by itself. Of the others documents tell, or those that made them.
func RecordTells(rel string) bool {
	switch rel {
	case RelTarget, RelParent, RelTree, RelFiles, RelRootfs, RelResult:
		return true
	}
	return false
}
