package durable

import (
	"fmt"
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// File makes a regular file, which must not exist, from r. With sparse, blocks
// of zeros become holes. It returns the file's inode and length.
func (t *Tree) File(name string, a Attr, r io.Reader, sparse bool, buf []byte) (ino uint64, size int64, err error) {
	up, base, err := t.split(name)
	if err != nil {
		return 0, 0, err
	}
	fd, err := unix.Openat(int(up.Fd()), base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return 0, 0, kinded("file "+name, err)
	}
	f := os.NewFile(uintptr(fd), t.Path(name))
	rel := path.Join(t.rel, name)
	t.root.observe(Op{Kind: OpCreate, Path: rel})
	w := &treeFile{f: f, root: t.root, rel: rel, sparse: sparse}
	if size, err = copyFile(w, r, buf, name); err != nil {
		f.Close()
		return 0, size, err
	}
	if err = t.dress(fd, name, a); err == nil {
		err = setTime(fd, "", a.MTime, unix.AT_EMPTY_PATH)
	}
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	if err != nil {
		f.Close()
		return 0, size, kinded("file "+name, err)
	}
	return st.Ino, size, t.barrier.Add(f)
}

// treeFile writes a regular file, leaving out zeros if it may.
type treeFile struct {
	f      *os.File
	root   *Root
	rel    string
	off    int64
	sparse bool
}

// copyFile copies all of r and sets the length, holes at the end included.
// Errors of reading keep their own kind.
func copyFile(w *treeFile, r io.Reader, buf []byte, name string) (int64, error) {
	for {
		n, rerr := r.Read(buf)
		if n > 0 {
			if err := w.write(buf[:n]); err != nil {
				return w.off, kinded("file "+name, err)
			}
		}
		if rerr == io.EOF {
			break
		}
		if rerr != nil {
			return w.off, fmt.Errorf("file %s: %w", name, rerr)
		}
	}
	if w.sparse {
		if err := w.f.Truncate(w.off); err != nil {
			return w.off, kinded("file "+name, err)
		}
		w.root.observe(Op{Kind: OpResize, Path: w.rel, Off: w.off})
	}
	return w.off, nil
}

func (w *treeFile) write(p []byte) error {
	if !(w.sparse && allZero(p)) {
		if _, err := w.f.WriteAt(p, w.off); err != nil {
			return err
		}
		w.root.observe(Op{Kind: OpWrite, Path: w.rel, Off: w.off, Data: p})
	}
	w.off += int64(len(p))
	return nil
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
