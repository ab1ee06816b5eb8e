// Package errdefs names the kinds of error that cross a package boundary in
// varve.
//
// It re-exports the kinds of containerd/errdefs, so that what varve returns is
// understood by every caller that already speaks containerd, and adds two
// things of its own: [Corrupt], which carries the number of the invariant that
// was found broken and the object it was found on, and [Poisoned], which a
// store returns for everything after a failed sync.
//
// Owns nothing on disk. Every error that leaves a varve package wraps exactly
// one of these kinds; test with errors.Is, never by text.
package errdefs

import (
	"context"
	"errors"
	"fmt"

	cerrdefs "github.com/containerd/errdefs"
)

// The kinds, as containerd defines them.
var (
	ErrUnknown            = cerrdefs.ErrUnknown
	ErrInvalidArgument    = cerrdefs.ErrInvalidArgument
	ErrNotFound           = cerrdefs.ErrNotFound
	ErrAlreadyExists      = cerrdefs.ErrAlreadyExists
	ErrFailedPrecondition = cerrdefs.ErrFailedPrecondition
	ErrUnavailable        = cerrdefs.ErrUnavailable
	ErrNotImplemented     = cerrdefs.ErrNotImplemented
	ErrDataLoss           = cerrdefs.ErrDataLoss
	ErrPermissionDenied   = cerrdefs.ErrPermissionDenied
	ErrResourceExhausted  = cerrdefs.ErrResourceExhausted
	ErrOutOfRange         = cerrdefs.ErrOutOfRange
	ErrAborted            = cerrdefs.ErrAborted
	ErrInternal           = cerrdefs.ErrInternal
)

// ErrPoisoned is the kind of every durable operation after a sync of the store
// has failed once. The kernel may have dropped the dirty pages that it could
// not write, so a second sync that succeeds proves nothing: the store has to
// be opened anew.
var ErrPoisoned = fmt.Errorf("store poisoned by a failed sync: %w", ErrUnavailable)

// Corrupt says that an invariant of the on-disk format does not hold.
// It is of kind [ErrDataLoss].
type Corrupt struct {
	Invariant string // number in package layout, for example "B2"
	Object    string // what broke it, for example "blob sha256:ab…"
	Detail    string // what was seen there instead
}

func (c *Corrupt) Error() string {
	return fmt.Sprintf("%s breaks invariant %s: %s", c.Object, c.Invariant, c.Detail)
}

// Unwrap gives the kind.
func (c *Corrupt) Unwrap() error { return ErrDataLoss }

// AsCorrupt returns the first Corrupt in err's chain, or nil.
func AsCorrupt(err error) *Corrupt {
	var c *Corrupt
	if errors.As(err, &c) {
		return c
	}
	return nil
}

// Has tells whether err carries one of the kinds, or is the end of a context.
func Has(err error) bool {
	for _, kind := range []error{
		ErrUnknown, ErrInvalidArgument, ErrNotFound, ErrAlreadyExists, ErrFailedPrecondition,
		ErrUnavailable, ErrNotImplemented, ErrDataLoss, ErrPermissionDenied, ErrResourceExhausted,
		ErrOutOfRange, ErrAborted, ErrInternal, context.Canceled, context.DeadlineExceeded,
	} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}
