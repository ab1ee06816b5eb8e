// Package powercut cuts the power of a real file system, in tests: it lets a
// workload write to ext4, xfs or btrfs on a disk of its own that remembers
// every write and every flush, and makes of any moment of that past the disks
// that a power cut could have left.
//
// A [Rig] serves disks as files of a FUSE file system; a loop device stands on
// each file, and the file system on that. The loop driver turns the block
// layer's flush into FSYNC, and so the log of a recorded disk knows which
// writes were promised to last. A crash image is all that was written before
// the last flush that was complete at the moment of the cut, and of the rest
// nothing, everything, or a random choice torn into sectors of [TearSize].
//
// Disks live in memory, as changes to the disk that they are a fork of; a
// crash image costs what its recovery writes.
//
// Limits: a write is in the log when it is complete, so that a cut within one
// is not there; a disk that lies about flushes, or damages what it was not
// writing, is not simulated. The process that serves must not touch a served
// file system through a memory map: a page fault would wait for the garbage
// collector that waits for the fault. The workload is therefore another
// process.
//
// It must not know varve. A [Worker] may be watched by package faultcall. Start
// reading at record.go, then rig.go.
package powercut
