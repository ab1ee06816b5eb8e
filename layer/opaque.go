package layer

import (
	"golang.org/x/sys/unix"

	"varve.dev/durable"
)

// DropNeedlessOpaques unmarks, in the manifest and in its tree, the opaque
// directories that have nothing to hide on parents, the topmost first.
// Older kernels mark every directory that is made where several layers meet
// (newer ones where options forbid changes of layers: ovl_allow_offline_changes
// in fs/overlayfs/dir.c); put on other layers, such a mark would hide what it
// was never about. The root directory's mark stays.
func (m *Manifest) DropNeedlessOpaques(tree *durable.Tree, parents []Parent) error {
	for i := range m.Entries {
		e := &m.Entries[i]
		if !e.IsOpaque() || e.Names[0] == "." {
			continue
		}
		below, _, found := lookup(parents, e.Names[0])
		if found && below.Mode&unix.S_IFMT == unix.S_IFDIR {
			continue
		}
		if err := tree.RemoveXattr(e.Names[0], opaqueXattr); err != nil {
			return err
		}
		delete(e.Xattrs, opaqueXattr)
	}
	return nil
}

// HasOpaque tells whether any directory is marked.
func (m *Manifest) HasOpaque() bool {
	for i := range m.Entries {
		if m.Entries[i].IsOpaque() {
			return true
		}
	}
	return false
}
