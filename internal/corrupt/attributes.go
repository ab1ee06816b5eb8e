package corrupt

import (
	"encoding/hex"
	"errors"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// What lstat and listxattr say of files.
var attributeKinds = []Kind{
	{"mode", "a permission bit is the other one", each("file that is no link", notLink, chmod(0o001, 0o002, 0o004, 0o010, 0o020, 0o040, 0o100, 0o200, 0o400))},
	{"special mode", "a set-uid, set-gid or sticky bit is the other one", each("file that is no link", notLink, chmod(unix.S_ISUID, unix.S_ISGID, unix.S_ISVTX))},
	{"uid", "a file has another owner", each("file", anything, func(s *store, e entry) error { return chown(s, e, e.st.Uid+1+s.Uint32N(1000), e.st.Gid) })},
	{"gid", "a file has another group", each("file", anything, func(s *store, e entry) error { return chown(s, e, e.st.Uid, e.st.Gid+1+s.Uint32N(1000)) })},
	{"mtime", "a file has another time", each("file", anything, func(s *store, e entry) error { return retime(s, e, 1+s.Int64N(1<<30), 0) })},
	{"nanoseconds", "a file's time differs by less than a second", each("file", anything, func(s *store, e entry) error { return retime(s, e, 0, 1+s.Int64N(999_999_999)) })},
	{"xattr", "an xattr is gone, new, or has another value", each("file", anything, xattr)},
	{"capability", "a file lost its capabilities or has others", each("file", entry.regular, capability)},
	{"acl", "an access control list lets somebody in", each("file", entry.regular, func(s *store, e entry) error {
		s.did("layer %s: %q has an access control list", e.layer, e.name)
		return s.dressed(e, "system.posix_acl_access", acl(e.st.Mode))
	})},
	{"opaque lost", "a directory shows what it has to hide of the layers below", each("opaque directory", isOpaque, func(s *store, e entry) error {
		s.did("layer %s: %q is opaque no more", e.layer, e.name)
		return s.undressed(e, opaqueXattr)
	})},
	{"opaque gained", "a directory hides the layers below", each("directory that is not opaque", func(e entry) bool { return e.directory() && !isOpaque(e) }, func(s *store, e entry) error {
		s.did("layer %s: %q is opaque", e.layer, e.name)
		return s.dressed(e, opaqueXattr, "y")
	})},
	{"overlay mark", "a note of overlayfs's makes a mount show something else", each("file or directory", func(e entry) bool { return e.regular() || e.directory() }, overlayMark)},
	{"tree root", "the directory of a tree has another mode and owner", each("tree", entry.root, func(s *store, e entry) error {
		s.did("layer %s: its root has mode 0777 and the owner 65534", e.layer)
		s.wrong(e.layer, ".")
		return errors.Join(os.Chown(e.at, 65534, 65534), os.Chmod(e.at, 0o777))
	})},
}

func anything(entry) bool    { return true }
func notLink(e entry) bool   { return !e.link() }
func isOpaque(e entry) bool  { return e.directory() && hasXattr(e.at, opaqueXattr) }
func isCapable(e entry) bool { return e.regular() && hasXattr(e.at, capabilityXattr) }

const (
	opaqueXattr     = "trusted.overlay.opaque"
	capabilityXattr = "security.capability"
	// netRaw is cap_net_raw=ep (linux/capability.h, struct vfs_cap_data).
	netRaw = "0100000200200000000000000000000000000000"
)

func chmod(bits ...uint32) func(*store, entry) error {
	return func(s *store, e entry) error {
		bit := bits[s.IntN(len(bits))]
		mode := e.st.Mode&0o7777 ^ bit
		s.did("layer %s: %q has mode %#o, not %#o", e.layer, e.name, mode, e.st.Mode&0o7777)
		s.wrong(e.layer, e.first)
		return unix.Fchmodat(unix.AT_FDCWD, e.at, mode, 0)
	}
}

func chown(s *store, e entry, uid, gid uint32) error {
	s.did("layer %s: %q belongs to %d:%d, not %d:%d", e.layer, e.name, uid, gid, e.st.Uid, e.st.Gid)
	s.wrong(e.layer, e.first)
	return unix.Lchown(e.at, int(uid), int(gid))
}

func retime(s *store, e entry, seconds, nanoseconds int64) error {
	st := e.st
	st.Mtim.Sec -= seconds
	st.Mtim.Nsec = (st.Mtim.Nsec + nanoseconds) % 1e9
	s.did("layer %s: %q has the time %d.%09d, not %d.%09d", e.layer, e.name, st.Mtim.Sec, st.Mtim.Nsec, e.st.Mtim.Sec, e.st.Mtim.Nsec)
	s.wrong(e.layer, e.first)
	return setTimes(e.at, st)
}

// xattr takes one away, changes one, or adds one.
func xattr(s *store, e entry) error {
	if names := ownXattrs(e.at); len(names) > 0 && s.coin() {
		name := names[s.IntN(len(names))]
		if s.coin() {
			s.did("layer %s: %q lost its %s", e.layer, e.name, name)
			return s.undressed(e, name)
		}
		s.did("layer %s: %q has another %s", e.layer, e.name, name)
		return s.dressed(e, name, "another "+s.hex(4))
	}
	name := "trusted.stranger" // user xattrs are for files and directories
	if e.regular() || e.directory() {
		name = "user.stranger"
	}
	s.did("layer %s: %q has a new %s", e.layer, e.name, name)
	return s.dressed(e, name, s.hex(s.IntN(8)))
}

func capability(s *store, e entry) error {
	if capable, err := s.entry("file with capabilities", isCapable); err == nil && s.coin() {
		s.did("layer %s: %q lost its capabilities", capable.layer, capable.name)
		return s.undressed(capable, capabilityXattr)
	}
	value, err := hex.DecodeString(netRaw)
	if err != nil {
		return err
	}
	s.did("layer %s: %q has cap_net_raw=ep", e.layer, e.name)
	return s.dressed(e, capabilityXattr, string(value))
}

// overlayMark sets one of the xattrs by which overlayfs shows other contents,
// or none (Documentation/filesystems/overlayfs.rst).
func overlayMark(s *store, e entry) error {
	name, value := "trusted.overlay.redirect", "/etc"
	switch {
	case e.regular() && s.coin():
		name, value = "trusted.overlay.metacopy", ""
	case e.regular():
		name, value = "trusted.overlay.whiteout", "y"
	}
	s.did("layer %s: %q has %s", e.layer, e.name, name)
	return s.dressed(e, name, value)
}

// dressed sets an xattr.
func (s *store) dressed(e entry, name, value string) error {
	s.wrong(e.layer, e.first)
	return unix.Lsetxattr(e.at, name, []byte(value), 0)
}

func (s *store) undressed(e entry, name string) error {
	s.wrong(e.layer, e.first)
	return unix.Lremovexattr(e.at, name)
}

// ownXattrs are those that a layer lists.
func ownXattrs(at string) (names []string) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(at, buf)
	if err != nil {
		return nil
	}
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if strings.HasPrefix(name, "user.") {
			names = append(names, name)
		}
	}
	return names
}

func hasXattr(at, name string) bool {
	_, err := unix.Lgetxattr(at, name, make([]byte, 64<<10))
	return err == nil
}

// acl lets user 1000 read, beside what the mode says (linux/posix_acl_xattr.h:
// version 2, then tag, permissions and id of each entry).
func acl(mode uint32) string {
	entry := func(tag, perm byte, id string) string {
		return string([]byte{tag, 0, perm, 0}) + id
	}
	const nobody = "\xff\xff\xff\xff"
	return "\x02\x00\x00\x00" +
		entry(0x01, byte(mode>>6&7), nobody) + entry(0x02, 4, "\xe8\x03\x00\x00") + entry(0x04, byte(mode>>3&7), nobody) +
		entry(0x10, byte(mode>>3&7), nobody) + entry(0x20, byte(mode&7), nobody)
}
