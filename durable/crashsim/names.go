package crashsim

import "slices"

// place is one name in one directory.
type place struct {
	dir  *inode
	name string
}

// change is one step of a name's history that is not durable everywhere.
// A rename has one of each; a creation or link has no from, a removal no to.
type change struct {
	from, to *place
	node     *inode
}

// note carries out a change in what the running system sees, and keeps it
// until it is durable.
func (s *Sim) note(c change) {
	if c.from != nil {
		delete(c.from.dir.names, c.from.name)
	}
	if c.to != nil {
		c.to.dir.names[c.to.name] = c.node
	}
	s.pending = append(s.pending, c)
}

// noteRemoval removes the name, after everything below it.
func (s *Sim) noteRemoval(p place, n *inode) {
	for _, name := range sortedNames(n.names) {
		s.noteRemoval(place{n, name}, n.names[name])
	}
	s.note(change{from: &p, node: n})
}

// settle makes durable what is pending in the places that pick chooses.
// Changes of one place are made durable in their order.
func (s *Sim) settle(pick func(place) bool) {
	rest := s.pending[:0]
	for _, c := range s.pending {
		if c.to != nil && pick(*c.to) {
			c.to.dir.kept[c.to.name] = c.node
			if c.node.durable == nil {
				c.node.syncAttr() // a file comes to be with its attributes
			}
			c.to = nil
			if c.node.isDir() {
				// A directory has one place: it left its earlier ones.
				c.unkeep()
				rest = leave(rest, c.node)
			}
		}
		if c.from != nil && pick(*c.from) {
			c.unkeep()
		}
		if c.from != nil || c.to != nil {
			rest = append(rest, c)
		}
	}
	clear(s.pending[len(rest):])
	s.pending = rest
}

// unkeep makes the going of the old name durable.
func (c *change) unkeep() {
	if c.from != nil && c.from.dir.kept[c.from.name] == c.node {
		delete(c.from.dir.kept, c.from.name)
	}
	c.from = nil
}

// leave makes the going of a directory from the places it had before durable.
func leave(pending []change, dir *inode) []change {
	return slices.DeleteFunc(pending, func(c change) bool {
		if c.node == dir {
			c.unkeep()
		}
		return c.node == dir
	})
}

// syncDir makes the names in a directory durable.
func (s *Sim) syncDir(dir *inode) {
	dir.syncAttr()
	s.settle(func(p place) bool { return p.dir == dir })
}

// syncTree makes a file or directory durable with everything below it, and
// the way to it.
func (s *Sim) syncTree(way []place, top *inode) {
	dirs := map[*inode]bool{}
	var walk func(*inode)
	walk = func(i *inode) {
		i.syncData()
		if !i.isDir() || dirs[i] {
			return
		}
		dirs[i] = true
		for _, n := range i.names {
			walk(n)
		}
	}
	walk(top)
	s.settle(func(p place) bool { return dirs[p.dir] || slices.Contains(way, p) })
}

func sortedNames(m map[string]*inode) []string {
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}
