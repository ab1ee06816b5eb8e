package faultcall

import "golang.org/x/sys/unix"

const nativeArch = unix.AUDIT_ARCH_X86_64

// Calls that only older architectures have.
func init() {
	table[unix.SYS_OPEN] = call{"open", takes, none, 0, 1, none}
	table[unix.SYS_CREAT] = byName("creat", takes, none, 0)
	table[unix.SYS_MKDIR] = byName("mkdir", takes, none, 0)
	table[unix.SYS_MKNOD] = byName("mknod", takes, none, 0)
	table[unix.SYS_SYMLINK] = byName("symlink", takes, none, 1)
	table[unix.SYS_LINK] = byName("link", takes, none, 1)
	table[unix.SYS_RENAME] = byName("rename", takes, none, 1)
	table[unix.SYS_UNLINK] = byName("unlink", changes, none, 0)
	table[unix.SYS_RMDIR] = byName("rmdir", changes, none, 0)
	table[unix.SYS_CHMOD] = byName("chmod", changes, none, 0)
	table[unix.SYS_CHOWN] = byName("chown", changes, none, 0)
	table[unix.SYS_LCHOWN] = byName("lchown", changes, none, 0)
	table[unix.SYS_UTIME] = byName("utime", changes, none, 0)
	table[unix.SYS_UTIMES] = byName("utimes", changes, none, 0)
	table[unix.SYS_FUTIMESAT] = byName("futimesat", changes, 0, 1)
}
