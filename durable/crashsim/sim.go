package crashsim

import (
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"varve.dev/durable"
)

// Database says how the database in the root is copied.
type Database struct {
	Name string                  // its file's name in the root
	Copy func(w io.Writer) error // writes its last committed state
}

// Sim is the observer of one root.
type Sim struct {
	root *durable.Root
	db   Database

	mu      sync.Mutex
	top     *inode
	pending []change
	ops     int
	images  int
	missed  int
	every   int
	hook    func(Moment)
	leave   func(kind durable.OpKind, name string) bool
	err     error
}

// Attach makes a Sim of what stands in root, which counts as durable, and its
// observer. A zero db means there is none, or that its file is as good as any
// other.
func Attach(root *durable.Root, db Database) (*Sim, error) {
	s := &Sim{root: root, db: db}
	top, err := load(root.Path("."), map[uint64]*inode{})
	if err != nil {
		return nil, err
	}
	s.top = top
	s.adopt(".", top)
	s.syncTree(nil, top)
	if s.err != nil {
		return nil, s.err
	}
	root.SetObserver(s)
	return s, nil
}

// Detach ends the observation. Images may still be taken.
func (s *Sim) Detach() { s.root.SetObserver(nil) }

// Every calls fn after every k-th change; k of zero ends it. The workload
// stands still while fn runs: fn must not change anything in the root.
func (s *Sim) Every(k int, fn func(Moment)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.every, s.hook = k, fn
}

// LeaveOut plants a bug: where fn says so, what makes a name or its contents
// durable has no effect, as if the workload had not done it.
func (s *Sim) LeaveOut(fn func(kind durable.OpKind, name string) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leave = fn
}

func (s *Sim) leftOut(kind durable.OpKind, name string) bool {
	return s.leave != nil && s.leave(kind, name)
}

// Ops returns how many changes were seen.
func (s *Sim) Ops() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ops
}

// Images returns how many images were written.
func (s *Sim) Images() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.images
}

// Missed returns how many changes had names that lead through symbolic links
// or to what is not known; a barrier makes up for them.
func (s *Sim) Missed() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.missed
}

// Err returns the first failure to follow the workload, or nil. A test whose
// Sim has one proves nothing.
func (s *Sim) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Observe implements durable.Observer.
func (s *Sim) Observe(op durable.Op) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	if !s.apply(op) {
		s.missed++
	}
	s.ops++
	if s.every > 0 && s.hook != nil && s.ops%s.every == 0 {
		s.hook(Moment{N: s.ops, Op: op, sim: s})
	}
}

// apply follows one change and tells whether its names were known.
func (s *Sim) apply(op durable.Op) bool {
	switch op.Kind {
	case durable.OpCreate, durable.OpMkdir, durable.OpSymlink, durable.OpMknod:
		return s.created(op.Path)
	case durable.OpLink:
		return s.linked(op.Path, op.To)
	case durable.OpRename:
		return s.renamed(op.Path, op.To)
	case durable.OpSyncDir, durable.OpBarrier:
		known := true
		for _, name := range append([]string{op.Path}, op.With...) {
			known = (s.leftOut(op.Kind, name) || s.madeDurable(op.Kind, name)) && known
		}
		return known
	}
	p, n := s.find(op.Path)
	if n == nil {
		return false
	}
	switch op.Kind {
	case durable.OpWrite:
		n.write(op.Off, op.Data)
	case durable.OpResize:
		n.resize(op.Off)
	case durable.OpSync:
		if !s.leftOut(op.Kind, op.Path) {
			s.refresh(op.Path, n)
			n.syncData()
		}
	case durable.OpSetattr:
		s.refresh(op.Path, n)
	case durable.OpRemove:
		s.noteRemoval(p, n)
	default:
		s.fail(fmt.Errorf("crashsim: change of unknown kind %d to %s", op.Kind, op.Path))
	}
	return true
}

// created takes over a name that came to be, from the disk but for contents:
// they are told in changes of their own.
func (s *Sim) created(rel string) bool {
	p, old := s.find(rel)
	if p.dir == nil {
		return false
	}
	var st unix.Stat_t
	if err := unix.Lstat(s.root.Path(rel), &st); err != nil {
		return false // gone already, by another goroutine
	}
	if old != nil && old.isDir() && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		s.refresh(rel, old) // a directory that was there and got attributes
		return true
	}
	n := &inode{typ: st.Mode & unix.S_IFMT, rdev: st.Rdev}
	if n.isDir() {
		n.names, n.kept = map[string]*inode{}, map[string]*inode{}
	}
	if n.typ == unix.S_IFLNK {
		n.target, _ = os.Readlink(s.root.Path(rel))
	}
	s.refresh(rel, n)
	s.note(change{to: &p, node: n})
	return true
}

func (s *Sim) linked(rel, to string) bool {
	_, n := s.find(rel)
	p, _ := s.find(to)
	if n == nil || p.dir == nil {
		return false
	}
	s.note(change{to: &p, node: n})
	return true
}

func (s *Sim) renamed(rel, to string) bool {
	from, n := s.find(rel)
	p, _ := s.find(to)
	if p.dir == nil || from.dir == nil {
		return false
	}
	if n == nil {
		// Made past package durable, as the database is: its maker has
		// synced its contents, not its name.
		var err error
		if n, err = load(s.root.Path(to), map[uint64]*inode{}); err != nil {
			return false
		}
		n.syncData()
		s.note(change{to: &from, node: n})
	}
	s.note(change{from: &from, to: &p, node: n})
	return true
}

func (s *Sim) madeDurable(kind durable.OpKind, rel string) bool {
	p, n := s.find(rel)
	if n == nil && kind == durable.OpBarrier && p.dir != nil {
		var err error
		if n, err = load(s.root.Path(rel), map[uint64]*inode{}); err == nil {
			s.note(change{to: &p, node: n})
		}
	}
	if n == nil {
		return false
	}
	if kind == durable.OpSyncDir {
		s.refresh(rel, n)
		s.syncDir(n)
		return true
	}
	s.adopt(rel, n)
	s.syncTree(s.way(rel), n)
	return true
}

// find returns the place that rel names and what is there, or nil. The
// place's directory is nil if it is not known.
func (s *Sim) find(rel string) (place, *inode) {
	rel = path.Clean(rel)
	if rel == "." {
		return place{}, s.top
	}
	dir, parts := s.top, strings.Split(rel, "/")
	for _, part := range parts[:len(parts)-1] {
		if dir = dir.names[part]; dir == nil || !dir.isDir() {
			return place{}, nil
		}
	}
	last := parts[len(parts)-1]
	return place{dir, last}, dir.names[last]
}

// way returns the places that lead from the root to rel.
func (s *Sim) way(rel string) []place {
	var out []place
	for rel = path.Clean(rel); rel != "."; rel = path.Dir(rel) {
		if p, _ := s.find(rel); p.dir != nil {
			out = append(out, p)
		}
	}
	return out
}

// refresh reads the attributes from the disk.
func (s *Sim) refresh(rel string, n *inode) {
	var st unix.Stat_t
	full := s.root.Path(rel)
	if unix.Lstat(full, &st) != nil {
		return
	}
	if a, err := readAttr(full, &st); err == nil {
		n.attr = a
	}
}

func (s *Sim) fail(err error) {
	if s.err == nil {
		s.err = err
	}
}
