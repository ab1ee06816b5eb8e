// Package image is names and manifests: it pulls, pushes, loads and saves
// images, and lists, inspects, tags and removes them.
//
// Owns the rows of images in the database, and the edges from them over index
// and manifest down to blobs and the snapshot of the unpacked layers. It must
// not know how a tree is made of a tar stream (the [Unpacker] it is given
// does), how anything gets durable (package journal does), or who asked.
//
// Everything that an image brings is published in one step: blobs are written
// as ingests, layers into staging, and one journal.Publish gives them their
// names and records. Whatever goes wrong before that leaves nothing but the
// ingests, from which the next pull goes on. An ingest whose digest was wrong
// is thrown away.
//
// What comes from a registry is believed only after its digest and size were
// compared with what named it: the manifest with the tag's digest, config and
// layers with the manifest, each layer's tar stream with the config.
//
// Concurrency: everything may run at once. Two operations that bring the same
// blob take turns by digest, in the order of digests, so they cannot wait for
// each other in a circle; the later one then finds the blob. No lock is held
// meanwhile, the turn is a reservation that ends with the operation's context.
//
// Crash story: before the journal's intent, ingests stay and staging is
// garbage of an earlier boot or process; after it, recovery finishes what was
// begun; see layout.Transitions. What an operation found in the store and
// counts on is held by a lease, which ends with the process.
//
// Start reading at pull.go, then assembly.go and layers.go for the pipeline,
// then stream.go and transport.go for how a download never hangs.
package image
