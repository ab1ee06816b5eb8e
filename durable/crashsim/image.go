package crashsim

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"varve.dev/durable"
)

// Mode says how much of what is not durable an image has.
type Mode int

// The modes.
const (
	None Mode = iota // nothing
	All              // everything
	Some             // a subset, by the seed
)

func (m Mode) String() string {
	return [...]string{"none", "all", "some"}[m]
}

// blockSize is the grain at which contents reach the disk.
const blockSize = 4096

// Moment is the workload stopped after one change.
type Moment struct {
	N   int // the change's number, from 1
	Op  durable.Op
	sim *Sim
}

// Image writes what a power cut at this moment could leave into dir, which
// must not exist.
func (m Moment) Image(dir string, mode Mode, seed uint64) error {
	return m.sim.image(dir, mode, seed)
}

// Image does the same at a moment that the caller chooses: at a fault point,
// or at the end. Not to be called from the function given to [Sim.Every].
func (s *Sim) Image(dir string, mode Mode, seed uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.image(dir, mode, seed)
}

func (s *Sim) image(dir string, mode Mode, seed uint64) error {
	if s.err != nil {
		return s.err
	}
	w := &writer{
		sim: s, mode: mode,
		rand:  rand.New(rand.NewPCG(seed, uint64(s.ops))),
		names: map[*inode]map[string]*inode{},
		done:  map[*inode]string{},
	}
	w.choose()
	if err := w.put(dir, s.top); err != nil {
		return fmt.Errorf("crash image %s: %w", dir, err)
	}
	s.images++
	return nil
}

// writer makes one image.
type writer struct {
	sim   *Sim
	mode  Mode
	rand  *rand.Rand
	names map[*inode]map[string]*inode // directories that differ from what is durable
	done  map[*inode]string            // where a file was put first
}

func (w *writer) chance() bool { return w.rand.IntN(2) == 0 }

// in returns the names of a directory in the image.
func (w *writer) in(dir *inode) map[string]*inode {
	if m, ok := w.names[dir]; ok {
		return m
	}
	return dir.kept
}

func (w *writer) set(p place, n *inode) {
	m, ok := w.names[p.dir]
	if !ok {
		m = maps.Clone(p.dir.kept)
		w.names[p.dir] = m
	}
	if n == nil {
		delete(m, p.name)
		return
	}
	m[p.name] = n
}

// choose applies some of the pending changes. One that is left out keeps the
// later ones of the same names out too: a name's history has no gaps.
func (w *writer) choose() {
	if w.mode == None {
		return
	}
	blocked := map[place]bool{}
	for _, c := range w.sim.pending {
		var places []place
		for _, p := range []*place{c.from, c.to} {
			if p != nil {
				places = append(places, *p)
			}
		}
		take := w.mode == All || w.chance()
		for _, p := range places {
			take = take && !blocked[p]
		}
		if c.from != nil && c.to == nil && c.node.isDir() && len(w.in(c.node)) > 0 {
			take = false // not empty in this image
		}
		if !take {
			for _, p := range places {
				blocked[p] = true
			}
			continue
		}
		if c.from != nil && w.in(c.from.dir)[c.from.name] == c.node {
			w.set(*c.from, nil)
		}
		if c.to != nil {
			w.set(*c.to, c.node)
		}
	}
}

// put writes one file at path, with everything below it.
func (w *writer) put(path string, n *inode) error {
	if first, ok := w.done[n]; ok {
		if n.isDir() {
			return fmt.Errorf("directory %s has a second place %s", first, path)
		}
		return os.Link(first, path)
	}
	w.done[n] = path
	if err := w.make(path, n); err != nil {
		return err
	}
	if n.isDir() {
		names := w.in(n)
		for _, name := range sortedNames(names) {
			if n == w.sim.top && name == w.sim.db.Name && w.sim.db.Copy != nil {
				if err := w.copyDatabase(filepath.Join(path, name)); err != nil {
					return err
				}
				continue
			}
			if err := w.put(filepath.Join(path, name), names[name]); err != nil {
				return err
			}
		}
	}
	return w.dress(path, n)
}

func (w *writer) make(path string, n *inode) error {
	switch n.typ {
	case unix.S_IFDIR:
		return os.Mkdir(path, 0o700)
	case unix.S_IFREG:
		return os.WriteFile(path, w.contents(n), 0o600)
	case unix.S_IFLNK:
		return os.Symlink(n.target, path)
	}
	return unix.Mknod(path, n.typ|0o600, int(n.rdev))
}

// contents are those of the file in the image.
func (w *writer) contents(n *inode) []byte {
	switch w.mode {
	case None:
		return n.synced
	case All:
		return n.live
	}
	old, now := n.synced, n.live
	size := len(old)
	if w.chance() {
		size = len(now)
	}
	out := make([]byte, size)
	copy(out, old)
	for off := 0; off < min(size, len(now)); off += blockSize {
		if w.chance() {
			copy(out[off:min(off+blockSize, size)], now[off:min(off+blockSize, len(now))])
		}
	}
	return out
}

func (w *writer) copyDatabase(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(w.sim.db.Copy(f), f.Close())
}

// dress gives the file the attributes it has in the image.
func (w *writer) dress(path string, n *inode) error {
	a := n.attr
	if n.durable != nil && (w.mode == None || w.mode == Some && w.chance()) {
		a = *n.durable
	}
	if err := os.Lchown(path, a.uid, a.gid); err != nil {
		return err
	}
	for name, value := range a.xattrs {
		if err := unix.Lsetxattr(path, name, []byte(value), 0); err != nil {
			return fmt.Errorf("extended attribute %s of %s: %w", name, path, err)
		}
	}
	if n.typ != unix.S_IFLNK {
		if err := unix.Chmod(path, a.mode); err != nil {
			return err
		}
	}
	times := []unix.Timespec{a.mtime, a.mtime}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, times, unix.AT_SYMLINK_NOFOLLOW)
}
