// Package faultcall lets the system calls with which a process, and all that
// it starts, changes files below some directories fail when they are told to, or
// take longer: a disk that breaks or is full at exactly the k-th change, or one
// whose flushes are slow, under whatever file system is there.
//
// A seccomp filter in the watched program ([Enter]) has the kernel stop it at
// each call that could be such a change and ask the watcher ([Watch]), which
// looks where the call leads and answers: go on, or this errno. Calls that are
// not in the table, and opens that only read, are not stopped.
//
// Limits: names are compared as they are written, with no links resolved but
// those of /proc/self/fd; a program that changes its root may have other files
// under such a name. What the kernel itself writes, as overlayfs does for a
// call on a mounted tree, is no call of anybody's. It wants root and Linux 5.19,
// and was tested on amd64; elsewhere only calls that all architectures have are in
// the table.
//
// It imports nothing of varve. Start reading at watch.go, then calls.go.
package faultcall
