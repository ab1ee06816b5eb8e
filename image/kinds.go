package image

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	cerrdefs "github.com/containerd/errdefs"

	"varve.dev/errdefs"
)

// remoteError gives what a registry or the way to it answered exactly one
// kind, and says what it was about.
func remoteError(what string, err error) error {
	if err == nil {
		return nil
	}
	if ctxErr := errors.Join(onlyIf(err, context.Canceled), onlyIf(err, context.DeadlineExceeded)); ctxErr != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if kind := kindOf(err); kind != nil {
		return fmt.Errorf("%s: %w: %w", what, err, kind)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func onlyIf(err, target error) error {
	if errors.Is(err, target) {
		return target
	}
	return nil
}

// kindOf returns the kind to add to err, or nil if it has one.
func kindOf(err error) error {
	var status remoteerrors.ErrUnexpectedStatus
	switch {
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return errdefs.ErrPermissionDenied
	case errors.As(err, &status):
		return statusKind(status.StatusCode)
	case cerrdefs.Resolve(err) != cerrdefs.ErrUnknown:
		return nil
	default:
		// What has no kind here is the transport: refused, reset, no such
		// host, a certificate that does not fit.
		return errdefs.ErrUnavailable
	}
}

func statusKind(code int) error {
	switch code {
	case http.StatusUnauthorized, http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case http.StatusNotFound:
		return errdefs.ErrNotFound
	case http.StatusRequestedRangeNotSatisfiable:
		return errdefs.ErrOutOfRange
	case http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusRequestEntityTooLarge:
		return errdefs.ErrInvalidArgument
	}
	return errdefs.ErrUnavailable
}

// permanent tells whether asking again cannot help.
func permanent(err error) bool {
	for _, kind := range []error{
		errdefs.ErrNotFound, errdefs.ErrPermissionDenied, errdefs.ErrInvalidArgument,
		errdefs.ErrFailedPrecondition, errdefs.ErrOutOfRange, errdefs.ErrNotImplemented,
	} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// final tells whether the layer below has tried all there is to try, or
// asking again cannot help.
func final(err error) bool { return permanent(err) || errors.Is(err, errGaveUp) }
