package crashsim

import (
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// adopt brings what is known of a tree up to what is on the disk: attributes
// that were set last and without notice, and what was written past package
// durable.
func (s *Sim) adopt(rel string, n *inode) {
	seen := map[uint64]*inode{}
	s.index(rel, n, seen)
	s.adoptBelow(rel, n, seen)
}

// index remembers which inode number is which known file, so that a new name
// of a known file becomes a link.
func (s *Sim) index(rel string, n *inode, seen map[uint64]*inode) {
	var st unix.Stat_t
	if unix.Lstat(s.root.Path(rel), &st) == nil && st.Mode&unix.S_IFMT == n.typ {
		seen[st.Ino] = n
	}
	for name, child := range n.names {
		s.index(path.Join(rel, name), child, seen)
	}
}

func (s *Sim) adoptBelow(rel string, n *inode, seen map[uint64]*inode) {
	s.refresh(rel, n)
	if !n.isDir() {
		s.adoptContents(rel, n)
		return
	}
	entries, err := os.ReadDir(s.root.Path(rel))
	if err != nil {
		return // gone meanwhile
	}
	there := map[string]bool{}
	for _, e := range entries {
		name, childRel := e.Name(), path.Join(rel, e.Name())
		there[name] = true
		child := n.names[name]
		if child == nil || !sameFile(s.root.Path(childRel), child, seen) {
			if child, err = load(s.root.Path(childRel), seen); err != nil {
				continue
			}
			s.note(change{to: &place{n, name}, node: child})
		}
		s.adoptBelow(childRel, child, seen)
	}
	for _, name := range sortedNames(n.names) {
		if !there[name] {
			s.noteRemoval(place{n, name}, n.names[name])
		}
	}
}

// sameFile tells whether the file at full is the known one.
func sameFile(full string, known *inode, seen map[uint64]*inode) bool {
	var st unix.Stat_t
	return unix.Lstat(full, &st) == nil && seen[st.Ino] == known
}

// adoptContents reads a file again whose length is not the known one. A write
// of the same length past package durable goes unseen.
func (s *Sim) adoptContents(rel string, n *inode) {
	if n.typ != unix.S_IFREG {
		return
	}
	full := s.root.Path(rel)
	if fi, err := os.Lstat(full); err != nil || fi.Size() == int64(len(n.live)) {
		return
	}
	if data, err := os.ReadFile(full); err == nil {
		n.live = data
	}
}
