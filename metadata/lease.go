package metadata

import (
	"context"
	"sync"
	"time"

	"varve.dev/layout"
)

// Lease keeps what an operation has found or made until the operation ends,
// one way or the other. It is nothing in the database until something is held.
//
// A lease without expiry ends with the process: recovery drops it.
type Lease struct {
	db      *DB
	id      layout.LeaseID
	purpose string

	mu   sync.Mutex
	made bool
}

// NewLease returns a lease that holds nothing yet.
func (db *DB) NewLease(purpose string) *Lease {
	return &Lease{db: db, id: layout.LeaseID(layout.NewID()), purpose: purpose}
}

// Node is the parent of everything the lease holds. An edge from it may only
// be stored through [Lease.Hold] or after [Lease.Make].
func (l *Lease) Node() layout.Node { return layout.LeaseNode(l.id) }

// Make records the lease, if that has not happened yet.
func (l *Lease) Make(ctx context.Context) error {
	l.mu.Lock()
	made := l.made
	l.mu.Unlock()
	if made {
		return nil
	}
	return l.Hold(ctx, func(*Tx) ([]layout.Node, error) { return nil, nil })
}

// Hold runs find and holds what it returns, in one transaction: nothing can go
// between the finding and the holding. find may run more than once.
func (l *Lease) Hold(ctx context.Context, find func(*Tx) ([]layout.Node, error)) error {
	err := l.db.Update(ctx, func(tx *Tx) error {
		nodes, err := find(tx)
		if err != nil {
			return err
		}
		if !tx.Leases().Has(l.id) {
			rec := layout.LeaseRecord{Purpose: l.purpose, Created: time.Now().UTC()}
			if err := tx.Leases().Put(l.id, rec); err != nil {
				return err
			}
		}
		for _, n := range nodes {
			if err := tx.Link(layout.Edge{Parent: l.Node(), Rel: layout.RelHolds, Child: n}); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		l.mu.Lock()
		l.made = true
		l.mu.Unlock()
	}
	return err
}

// Release ends the lease; what nothing else needs goes. It is carried out
// even if ctx has ended.
func (l *Lease) Release(ctx context.Context) error {
	l.mu.Lock()
	made := l.made
	l.made = false
	l.mu.Unlock()
	if !made {
		return nil
	}
	return l.db.Update(context.WithoutCancel(ctx), func(tx *Tx) error { return tx.Drop(l.Node()) })
}

// EndLeases drops the leases that are over, with what they alone held, and returns
// how many. Nothing is written if none is.
func (db *DB) EndLeases(ctx context.Context, over func(layout.LeaseRecord) bool) (int, error) {
	var ids []layout.LeaseID
	find := func(tx *Tx) error {
		ids = ids[:0]
		return tx.Leases().Each("", func(id layout.LeaseID, l layout.LeaseRecord) error {
			if over(l) {
				ids = append(ids, id)
			}
			return nil
		})
	}
	if err := db.View(ctx, find); err != nil || len(ids) == 0 {
		return 0, err
	}
	err := db.Update(ctx, func(tx *Tx) error {
		if err := find(tx); err != nil { // one may have been renewed meanwhile
			return err
		}
		for _, id := range ids {
			if err := tx.Drop(layout.LeaseNode(id)); err != nil {
				return err
			}
		}
		return nil
	})
	return len(ids), err
}
