package testkit

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// HashTree returns a digest over [ListTree].
func HashTree(dir string) (string, error) {
	lines, err := ListTree(dir)
	sum := sha256.Sum256([]byte(strings.Join(lines, "\n")))
	return hex.EncodeToString(sum[:]), err
}

// ListTree describes everything that a layer may hold below dir, a line for
// each name in order: type, mode, owner, size, mtime, device numbers, link
// target, xattrs, which names are one file, and the digest of the contents. It
// shares no code with what writes or checks a layer.
func ListTree(dir string) (lines []string, err error) {
	names := map[uint64]string{} // inode → its first name
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		var line strings.Builder
		err = describeEntry(&line, path, rel, names)
		lines = append(lines, line.String())
		return err
	})
	return lines, err
}

func describeEntry(w io.Writer, path, rel string, names map[uint64]string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	fmt.Fprintf(w, "%q mode %o owner %d:%d mtime %d.%09d", rel, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
	if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
		first, ok := names[st.Ino]
		if ok {
			fmt.Fprintf(w, " is %q", first)
			return nil
		}
		names[st.Ino] = rel
	}
	if err := describeXattrs(w, path); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		fmt.Fprintf(w, " size %d ", st.Size)
		return describeContents(w, path)
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, " to %q", target)
	case unix.S_IFCHR, unix.S_IFBLK:
		fmt.Fprintf(w, " device %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	return nil
}

func describeContents(w io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return err
	}
	fmt.Fprintf(w, "%x", sum.Sum(nil))
	return nil
}

// overlayNotes are what overlayfs notes for itself on what it copies up: no mount
// shows it, and two trees that are the same may differ in it.
var overlayNotes = []string{"trusted.overlay.origin", "trusted.overlay.impure", "trusted.overlay.nlink", "trusted.overlay.uuid"}

func describeXattrs(w io.Writer, path string) error {
	list, err := xattrValue(func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) })
	if errors.Is(err, unix.ENOTSUP) || err == nil && list == "" {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "listxattr", Path: path, Err: err}
	}
	names := strings.Split(strings.TrimSuffix(list, "\x00"), "\x00")
	slices.Sort(names)
	for _, name := range names {
		if slices.Contains(overlayNotes, name) {
			continue
		}
		value, err := xattrValue(func(buf []byte) (int, error) { return unix.Lgetxattr(path, name, buf) })
		if err != nil {
			return &fs.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		fmt.Fprintf(w, " %q=%q", name, value)
	}
	return nil
}

func xattrValue(read func([]byte) (int, error)) (string, error) {
	n, err := read(nil)
	if err != nil || n == 0 {
		return "", err
	}
	buf := make([]byte, n)
	n, err = read(buf)
	return string(buf[:max(n, 0)]), err
}
