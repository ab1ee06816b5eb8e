// Package limittest works stores that have limits, and looks all the while at
// what they take of the disk, as `du` does: never more than the limit, but for
// what running steps of builds have written.
//
// Start reading at watch_test.go.
//
// It consists of tests only.
package limittest
