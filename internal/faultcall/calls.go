package faultcall

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// effect is what a call does to a disk.
type effect uint8

const (
	takes   effect = iota + 1 // it may take space
	changes                   // it changes something, and takes no space
	flushes                   // it makes something permanent
)

// none is an argument that a call does not have.
const none = -1

// call says how a system call names what it changes, by its arguments'
// numbers: an open file, or a name that is relative to an open directory.
type call struct {
	name   string
	effect effect
	file   int // descriptor of the file, or of the directory that path is in
	path   int
	flags  int // of an open
	how    int // of openat2
}

// onFile is a call whose argument i is the open file that it changes.
func onFile(name string, e effect, i int) call { return call{name, e, i, none, none, none} }

// byName is a call on the name in argument path, in the directory dir.
func byName(name string, e effect, dir, path int) call { return call{name, e, dir, path, none, none} }

// table has every call that changes files, by number. What only reads with
// some flags is told apart by the filter, or by [Watch].
var table = map[uint32]call{
	unix.SYS_WRITE:           onFile("write", takes, 0),
	unix.SYS_PWRITE64:        onFile("pwrite64", takes, 0),
	unix.SYS_WRITEV:          onFile("writev", takes, 0),
	unix.SYS_PWRITEV:         onFile("pwritev", takes, 0),
	unix.SYS_PWRITEV2:        onFile("pwritev2", takes, 0),
	unix.SYS_COPY_FILE_RANGE: onFile("copy_file_range", takes, 2),
	unix.SYS_SENDFILE:        onFile("sendfile", takes, 0),
	unix.SYS_SPLICE:          onFile("splice", takes, 2),
	unix.SYS_FALLOCATE:       onFile("fallocate", takes, 0),
	unix.SYS_FTRUNCATE:       onFile("ftruncate", takes, 0),
	unix.SYS_TRUNCATE:        byName("truncate", takes, none, 0),

	unix.SYS_OPENAT:       {"openat", takes, 0, 1, 2, none},
	unix.SYS_OPENAT2:      {"openat2", takes, 0, 1, none, 2},
	unix.SYS_MKDIRAT:      byName("mkdirat", takes, 0, 1),
	unix.SYS_MKNODAT:      byName("mknodat", takes, 0, 1),
	unix.SYS_SYMLINKAT:    byName("symlinkat", takes, 1, 2),
	unix.SYS_LINKAT:       byName("linkat", takes, 2, 3),
	unix.SYS_RENAMEAT:     byName("renameat", takes, 2, 3),
	unix.SYS_RENAMEAT2:    byName("renameat2", takes, 2, 3),
	unix.SYS_UNLINKAT:     byName("unlinkat", changes, 0, 1),
	unix.SYS_SETXATTR:     byName("setxattr", takes, none, 0),
	unix.SYS_LSETXATTR:    byName("lsetxattr", takes, none, 0),
	unix.SYS_FSETXATTR:    onFile("fsetxattr", takes, 0),
	unix.SYS_FCHMOD:       onFile("fchmod", changes, 0),
	unix.SYS_FCHMODAT:     byName("fchmodat", changes, 0, 1),
	unix.SYS_FCHMODAT2:    byName("fchmodat2", changes, 0, 1),
	unix.SYS_FCHOWN:       onFile("fchown", changes, 0),
	unix.SYS_FCHOWNAT:     byName("fchownat", changes, 0, 1),
	unix.SYS_UTIMENSAT:    byName("utimensat", changes, 0, 1),
	unix.SYS_REMOVEXATTR:  byName("removexattr", changes, none, 0),
	unix.SYS_LREMOVEXATTR: byName("lremovexattr", changes, none, 0),
	unix.SYS_FREMOVEXATTR: onFile("fremovexattr", changes, 0),

	unix.SYS_FSYNC:           onFile("fsync", flushes, 0),
	unix.SYS_FDATASYNC:       onFile("fdatasync", flushes, 0),
	unix.SYS_SYNC_FILE_RANGE: onFile("sync_file_range", flushes, 0),
	unix.SYS_SYNCFS:          onFile("syncfs", flushes, 0),
}

// creating are the flags with which an open changes something.
const creating = unix.O_CREAT | unix.O_TRUNC | unix.O_TMPFILE&^unix.O_DIRECTORY

// numbers returns the calls of these names; all for none.
func numbers(names []string) (list []uint32, err error) {
	known := map[string]bool{}
	for nr, c := range table {
		known[c.name] = true
		if len(names) == 0 || slices.Contains(names, c.name) {
			list = append(list, nr)
		}
	}
	for _, n := range names {
		if !known[n] {
			return nil, fmt.Errorf("no call %q in the table", n)
		}
	}
	slices.Sort(list)
	return list, nil
}

// Where struct seccomp_data has what a filter looks at. An argument's lower
// half comes first.
const (
	dataNumber = 0
	dataArch   = 4
	dataArgs   = 16
)

// filter stops at these calls, and lets all others pass.
func filter(list []uint32) []unix.SockFilter {
	load := func(at int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: uint32(at)}
	}
	test := func(how uint16, value uint32, ifNot uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | how | unix.BPF_K, K: value, Jf: ifNot}
	}
	stop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF}
	pass := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}

	// Another architecture's calls have other numbers.
	f := []unix.SockFilter{load(dataArch), {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nativeArch, Jt: 1}, pass, load(dataNumber)}
	for _, nr := range list {
		if flags := table[nr].flags; flags != none {
			f = append(f, test(unix.BPF_JEQ, nr, 4), load(dataArgs+8*flags), test(unix.BPF_JSET, creating, 1), stop, pass)
		} else {
			f = append(f, test(unix.BPF_JEQ, nr, 1), stop)
		}
	}
	return append(f, pass)
}
