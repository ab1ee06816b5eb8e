package image

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	cerrdefs "github.com/containerd/errdefs"

	"varve.dev/errdefs"
)

// remoteError gives what a registry or the way to it answered exactly one
// kind, and says what it was about. Of the wrappings that the HTTP libraries
// put around their errors only the innermost that says something is kept.
func remoteError(what string, err error) error {
	var request *requestError
	var status remoteerrors.ErrUnexpectedStatus
	var transport *url.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s: %w", what, err)
	case errors.As(err, &request):
		return fmt.Errorf("%s: %w", what, request)
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return fmt.Errorf("%s: access denied, or it does not exist: %w", what, errdefs.ErrPermissionDenied)
	case errors.As(err, &status):
		return fmt.Errorf("%s: the registry answered %s: %w", what, status.Status, statusKind(status.StatusCode))
	case errors.As(err, &transport):
		err = transport.Err
	}
	if kind := kindOf(err); kind != nil {
		return fmt.Errorf("%s: %w: %w", what, err, kind)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// kindOf returns the kind to add to err, or nil if it has one. What has none
// comes from the transport (refused, reset, no such host, a certificate that
// does not fit) or from the operating system.
func kindOf(err error) error {
	if !errors.Is(cerrdefs.Resolve(err), cerrdefs.ErrUnknown) {
		return nil
	}
	return errdefs.ErrUnavailable
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
