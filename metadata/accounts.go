package metadata

import (
	"bytes"
	"errors"

	bolt "go.etcd.io/bbolt"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// The accounts are the records added up (A1). Every transaction that changes a
// record changes them too, and writes them with the state record.

// Accounts returns what the store holds. Its cost does not grow with it.
func (tx *Tx) Accounts() (layout.Accounts, error) {
	if tx.accounts == nil {
		state, err := tx.states().Get(layout.StateKey)
		if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			return nil, err
		}
		tx.accounts = state.Accounts.Clone()
	}
	return tx.accounts, nil
}

// account books a record's change. old and new are its values, nil for none.
func (tx *Tx) account(bucket, key string, old, new []byte) error {
	if name, _ := layout.AccountOf(bucket, key, nil); name == "" {
		return nil
	}
	all, err := tx.Accounts()
	if err != nil {
		return err
	}
	name, change := "", layout.Usage{}
	if new != nil {
		name, change = layout.AccountOf(bucket, key, layout.Body(new))
	}
	if old != nil {
		before, was := layout.AccountOf(bucket, key, layout.Body(old))
		name, change = before, change.Minus(was)
	}
	all.Add(name, change)
	if spare := layout.SpareAccount(name); spare != "" && !tx.inUse(nodeOf(bucket, key)) {
		all.Add(spare, change)
	}
	return nil
}

// nodeOf is the node whose record stands in a bucket.
func nodeOf(bucket, key string) layout.Node {
	switch bucket {
	case layout.BucketBlobs:
		return layout.BlobNode(layout.BlobDigest(key))
	case layout.BucketLayers:
		return layout.LayerNode(layout.LayerID(key))
	}
	return ""
}

// What is in use: see layout.Node.User. Each edge whose parent is in use stands
// in BucketUses, so that one seek tells whether its child is.

// inUse tells whether an image, a container or an API needs n, or n is one.
func (tx *Tx) inUse(n layout.Node) bool {
	return n.User() || hasPrefix(tx.bolt.Bucket([]byte(layout.BucketUses)), layout.NodePrefix(n))
}

// hasPrefix tells whether some key of a bucket begins so.
func hasPrefix(b *bolt.Bucket, prefix []byte) bool {
	k, _ := b.Cursor().Seek(prefix)
	return k != nil && bytes.HasPrefix(k, prefix)
}

// use books an edge whose parent is in use, and what its child needs if it is
// the first such.
func (tx *Tx) use(e layout.Edge) error {
	return tx.spread(e, true)
}

// disuse takes an edge out of the book, and what its child needs if it was the
// last. One that is not booked is no error.
func (tx *Tx) disuse(e layout.Edge) error {
	return tx.spread(e, false)
}

// spread carries the beginning or the end of a use down to whatever it changes.
func (tx *Tx) spread(e layout.Edge, begins bool) error {
	todo := []layout.Edge{e}
	for len(todo) > 0 {
		e := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		was := tx.inUse(e.Child)
		var err error
		if begins {
			err = tx.put(layout.BucketUses, e.Key(), nil)
		} else {
			err = tx.remove(layout.BucketUses, e.Key())
		}
		if err != nil {
			return err
		}
		if tx.inUse(e.Child) == was {
			continue
		}
		children, err := tx.Children(e.Child)
		if err == nil {
			err = tx.shift(e.Child, begins)
		}
		if err != nil {
			return err
		}
		todo = append(todo, children...)
	}
	return nil
}

// shift books that the use of n began or ended.
func (tx *Tx) shift(n layout.Node, begins bool) error {
	kind, id := n.Split()
	bucket := recordBuckets[kind]
	if layout.SpareAccount(bucket) == "" {
		return nil
	}
	value := tx.bolt.Bucket([]byte(bucket)).Get([]byte(id))
	if value == nil {
		return nil // booked when its record comes
	}
	all, err := tx.Accounts()
	if err != nil {
		return err
	}
	name, usage := layout.AccountOf(bucket, id, layout.Body(value))
	if begins {
		usage = layout.Usage{}.Minus(usage)
	}
	all.Add(layout.SpareAccount(name), usage)
	return nil
}

// Recount makes the uses and the accounts anew from the records and the edges.
// Its cost grows with the store: it is for one that was damaged, or written by
// an older version.
func (tx *Tx) Recount() error {
	uses := tx.bolt.Bucket([]byte(layout.BucketUses))
	c := uses.Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.First() {
		if err := tx.remove(layout.BucketUses, k); err != nil {
			return err
		}
	}
	tx.accounts = layout.Accounts{}
	// Everything is spare at first.
	for _, bucket := range layout.Buckets() {
		err := tx.bolt.Bucket([]byte(bucket)).ForEach(func(k, v []byte) error {
			return tx.account(bucket, string(k), nil, v)
		})
		if err != nil {
			return err
		}
	}
	var used []layout.Edge
	err := tx.bolt.Bucket([]byte(layout.BucketEdges)).ForEach(func(k, _ []byte) error {
		e, err := layout.ParseEdge(k)
		if err == nil && e.Parent.User() {
			used = append(used, e)
		}
		return nil // M3 is another check's
	})
	for _, e := range used {
		err = errors.Join(err, tx.use(e))
	}
	return err
}
