// Package foreign holds the stores of other engines against what they
// recorded: an OCI image layout, the data root of dockerd with overlay2, and a
// root of containerd. It changes nothing, and needs no store of varve's.
//
// None of these engines makes the files of a layer durable before it says that
// a pull is done, and none of them compares a layer with anything afterwards.
// What each has recorded, though, is enough to do so: dockerd keeps, for every
// layer, the headers of its tar stream and a CRC-64 for each file (tar-split),
// of which the whole stream can be put together and hashed; containerd keeps
// the blob that the layer was unpacked from, and a layout the digests.
//
// A layer's stream becomes a tree in memory (expected.go) as the engine's
// unpacker would have made it on disk, and that is compared with the tree that
// is there (compare.go). What engines do differently and rightly is no
// finding: who reads wrong alarms for long enough reads none.
//
// The formats are read by code of this package's own, but for tar-split, whose
// library is the definition of its format. It must not import varve's writers.
// The three may be in use: what is being changed meanwhile is reported wrongly,
// and that the store is in use is a finding of its own (dockerd) or ends the
// check (containerd, which locks its database).
//
// Memory: what the databases list, one layer's files for each worker, and
// Options.Limit findings; the rest are counted.
//
// Start reading at foreign.go, then finding.go for what is said, then
// ocilayout.go, docker.go and containerd.go for the three.
package foreign
