// Package fsck is the independent witness: it holds a store against every
// invariant of package layout, one check for each number, and says what it
// found. It changes nothing.
//
// It imports none of the packages that write: it shares with them the law in
// layout and nothing else, and reads the database, the directories and the
// file manifests (a continuity Manifest message) with code of its own.
//
// Offline it opens varve.db read-only, walks its pages before bbolt does, and
// keeps the store closed to others until it is done.
// Online it is given the open database and holds no lock while it reads. It
// lists directories before it reads records, looks a second time at whatever
// it found, and reports what it saw twice; what an open intent, a sweep or a
// lease names is under way, not wrong.
//
// A database that damage makes panic or fault is a finding, never a crash.
// What one check has found another does not say again: a blob whose file is
// missing (B1) has no size (B2), digest (B3) or contents (L3) to be wrong, and
// from one whose bytes are not its digest's (B3) nothing is concluded.
//
// Files are reached through the open directory of the store or tree that they
// stand in, links are never followed, on the way neither, and nothing is opened
// but regular files and directories.
//
// Contents are read from the disk, past the page cache, which is held against
// them: package reach. A deep check can be of a part of the store (scope.go), and
// goes on where it was cut off (resume.go).
//
// Memory: the records, 8 bytes for each name in the layers that are read at the
// time, 600 KiB for each worker, the findings. Run may be called any number of
// times at once.
//
// Start reading at fsck.go, then checks.go for the table of checks by number,
// then records.go for what is loaded and tree.go for what a layer is held against.
package fsck
