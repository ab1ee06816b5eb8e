// Package layer is what a layer is: a tar stream of changes on one side, a
// tree that overlayfs can stack on the other, and the file manifest that says
// what the tree must hold.
//
// Owns nothing on disk by itself: it writes through the durable.Tree it is
// given, and reads trees it is shown. It must not know where layers are kept
// or what they are called.
//
// [Apply] unpacks a stream without its parents: a whiteout becomes a character
// device 0/0 and an opaque whiteout the xattr trusted.overlay.opaque (kernel
// documentation, filesystems/overlayfs.rst, "whiteouts and opaque
// directories"). What needs the parents is left in [Applied] for
// [Applied.Resolve]: directories that the stream implies and does not list,
// and hard links into a lower layer.
//
// [Export] is the way back. [Walk] describes a tree as it is; [Manifest] is
// that description, stored as a blob in containerd/continuity's format.
//
// The streams follow the OCI image-spec, layer.md. Where it leaves a choice
// the result is that of containerd's archive.Apply, with these exceptions: a
// name that leads out of the root is an error, not cut short; a whiteout never
// removes what the same layer brings; a directory that replaces a whiteout of
// its own name is opaque; xattrs by which overlayfs speaks to itself are not
// taken from a stream.
//
// Concurrency: every call stands for itself. Crash story: none, nothing here
// is durable before the caller's barrier.
//
// Start reading at apply.go, then manifest.go, then export.go.
package layer
