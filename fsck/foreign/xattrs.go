package foreign

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"varve.dev/fsck/reach"
)

// ofLayer tells whether an xattr is the layer's: what the kernel, a
// security module or overlayfs notes for itself is not.
func ofLayer(name string) bool {
	if strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
		return false
	}
	return name == capability || strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "trusted.") || strings.HasPrefix(name, "system.posix_acl_")
}

func (t *comparison) xattrs(want *expected, dirfd int, base string, st *unix.Stat_t) {
	if len(want.headers) == 0 {
		return // nothing lists it
	}
	got, err := reach.Xattrs(dirfd, base, t.buf, ofLayer)
	if err != nil {
		want.wrong(Xattr, "%v", err)
		return
	}
	for _, x := range slices.Sorted(maps.Keys(want.xattrs)) {
		have, there := got[x]
		if must := want.xattrs[x]; ofLayer(x) && have != must && !(x == capability && sameCapability(have, must)) {
			switch {
			case there:
				want.wrong(Xattr, "xattr %q is %q, must be %q", x, have, must)
			case !unsettable(want, x, st):
				want.wrong(Xattr, "xattr %q is missing, must be %q", x, must)
			}
		}
	}
	for _, x := range slices.Sorted(maps.Keys(got)) {
		if _, wanted := want.xattrs[x]; !wanted {
			// An engine that makes a layer of a tree that it has records
			// capabilities, and no other xattr.
			detail := fmt.Sprintf("xattr %q is %q, and its record has none", x, got[x])
			want.damages = append(want.damages, damage{kind: Xattr, detail: detail, notice: x != capability})
		}
	}
}

// isMetacopy tells whether a file has only the attributes of what it is, and
// its contents below.
func (t *comparison) isMetacopy(dirfd int, base string) bool {
	got, err := reach.Xattrs(dirfd, base, t.buf, func(name string) bool { return slices.Contains(metacopyXattrs, name) })
	return err == nil && len(got) > 0
}

// unsettable tells whether unpackers could not set an xattr, or would not, and
// went on.
func unsettable(e *expected, x string, st *unix.Stat_t) bool {
	switch kind := st.Mode & unix.S_IFMT; {
	case x == capability:
		return e.uncapable
	case strings.HasPrefix(x, "trusted."): // containerd does not, nor can a user namespace
		return true
	case strings.HasPrefix(x, "user."):
		return kind != unix.S_IFREG && kind != unix.S_IFDIR
	}
	return true // access control lists, where the file system has none
}

// sameCapability compares two values of security.capability. One that was set
// inside a user namespace is of revision 3, with that namespace's root behind
// what revision 2 has (linux/capability.h, struct vfs_ns_cap_data).
func sameCapability(a, b string) bool {
	const v2, v3 = 20, 24
	if len(a) == v3 && len(b) == v2 {
		a, b = b, a
	}
	return len(a) == v2 && len(b) == v3 && a[:3] == b[:3] && a[4:] == b[4:v2]
}

// opaque compares whether a directory hides what lower layers have in it. One
// that has whiteouts instead hides as much.
func (t *comparison) opaque(d *os.File, want *node, name string, marked bool, above hiding) {
	switch {
	case want.opaque == mayBeOpaque:
	case marked && !above.record && want.opaque == transparent:
		if hides := t.shows(want, name, nil); hides != "" {
			t.mend(Xattr, name, "it is marked opaque and must not be: it hides %q of a lower layer", hides)
		}
	case want.opaque == opaque && !above.disk && !marked:
		if shows := t.shows(want, name, d); shows != "" {
			t.mend(Xattr, name, "it is not marked opaque and must be: %q of a lower layer shows", shows)
		}
	}
}

// shows is the first name of lower layers in a directory that neither the
// record has nor, if given, the open directory.
func (t *comparison) shows(want *node, name string, d *os.File) string {
	for _, below := range t.below.names(name) {
		if want.children[below] != nil {
			continue
		}
		var st unix.Stat_t
		if d == nil || unix.Fstatat(int(d.Fd()), below, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
			return below
		}
	}
	return ""
}
