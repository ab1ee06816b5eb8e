package fsck

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"

	bolt "go.etcd.io/bbolt"

	"varve.dev/layout"
)

// usesWritten: E5.
func (c *checker) usesWritten(f found) {
	if n := len(c.rec.uses); n > 0 {
		slices.Sort(c.rec.uses)
		f("uses", "", "%d are wrong: %s", n, few(c.rec.uses))
	}
}

// readUses compares what is booked as uses with the edges.
func (c *checker) readUses(tx *bolt.Tx, rec *records) {
	b := tx.Bucket([]byte(layout.BucketUses))
	if b == nil {
		return // M2
	}
	rec.inUse = rec.used()
	wrong := func(e layout.Edge, detail string) { rec.uses = append(rec.uses, edgeObject(e)+": "+detail) }
	cursor := b.Cursor()
	for e := range rec.edges {
		key := e.Key()
		k, _ := cursor.Seek(key)
		has, should := bytes.Equal(k, key), rec.inUse[e.Parent] || e.Parent.User()
		switch {
		case has && !should:
			wrong(e, "it stands in uses, and its parent is not in use")
		case should && !has:
			wrong(e, "its parent is in use, and it does not stand in uses")
		}
	}
	c.readKeys(tx, layout.BucketUses, func(k []byte) error {
		e, err := layout.ParseEdge(k)
		if err == nil {
			err = validEdge(e)
		}
		if err != nil {
			return err
		}
		if !rec.edges[e] {
			wrong(e, "it stands in uses, and not in edges")
		}
		return nil
	})
}

// few lists some of what is wrong.
func few(all []string) string {
	const some = 5
	if len(all) <= some {
		return strings.Join(all, "; ")
	}
	return strings.Join(all[:some], "; ") + "; …"
}

// used returns what images, containers and the APIs need, all the way down.
func (rec *records) used() map[layout.Node]bool {
	children := map[layout.Node][]layout.Node{}
	used := map[layout.Node]bool{}
	var todo []layout.Node
	for e := range rec.edges {
		children[e.Parent] = append(children[e.Parent], e.Child)
		if e.Parent.User() {
			todo = append(todo, e.Child)
		}
	}
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if used[n] {
			continue
		}
		used[n] = true
		todo = append(todo, children[n]...)
	}
	return used
}

// accountsAddUp: A1. Records that cannot be read have findings of their own, and
// cannot be added up.
func (c *checker) accountsAddUp(f found) {
	rec := c.rec
	if len(rec.unreadable) > 0 || len(c.damage) > 0 {
		return
	}
	sums := layout.Accounts{}
	count := func(name string, u layout.Usage, n layout.Node) {
		sums.Add(name, u)
		if spare := layout.SpareAccount(name); spare != "" && !rec.inUse[n] {
			sums.Add(spare, u)
		}
	}
	for d, r := range rec.blobs {
		count(layout.AccountBlobs, layout.BlobUsage(r), layout.BlobNode(d))
	}
	for id, r := range rec.layers {
		count(layout.AccountLayers, layout.LayerUsage(r), layout.LayerNode(id))
	}
	for _, r := range rec.sweeps {
		count(layout.AccountTrash, layout.Usage{Count: 1, Bytes: r.Bytes, Inodes: r.Inodes}, "")
	}
	for path, r := range rec.measures {
		count(layout.MeasureAccount(path), layout.Usage{Count: 1, Bytes: r.Bytes, Inodes: r.Inodes}, "")
	}
	for name, n := range map[string]int{
		layout.AccountSnapshots: len(rec.snapshots), layout.AccountImages: len(rec.images),
		layout.AccountContainers: len(rec.containers), layout.AccountCache: len(rec.cache),
	} {
		count(name, layout.Usage{Count: int64(n)}, "")
	}
	names := slices.Sorted(maps.Keys(sums))
	for name := range rec.accounts {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	var wrong []string
	for _, name := range names {
		if has, want := rec.accounts[name], sums[name]; has != want {
			wrong = append(wrong, fmt.Sprintf("%s is %+v, the records add up to %+v", name, has, want))
		}
	}
	if len(wrong) > 0 {
		f("accounts", "", "%s", strings.Join(wrong, "; "))
	}
}
