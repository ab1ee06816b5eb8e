package varve

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"varve.dev/errdefs"
)

// frame is one line of an answer. One of its fields is set.
type frame struct {
	Event  *Event          `json:"event,omitempty"`
	Data   []byte          `json:"data,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
	Error  *wireError      `json:"error,omitempty"`
}

// wireError carries an error's kind and text over a socket.
type wireError struct {
	Kind    string           `json:"kind"`
	Message string           `json:"message"`
	Corrupt *errdefs.Corrupt `json:"corrupt,omitempty"`
}

// kinds names the kinds on the wire.
var kinds = []struct {
	name string
	err  error
}{
	{"not-found", errdefs.ErrNotFound},
	{"already-exists", errdefs.ErrAlreadyExists},
	{"invalid-argument", errdefs.ErrInvalidArgument},
	{"failed-precondition", errdefs.ErrFailedPrecondition},
	{"poisoned", errdefs.ErrPoisoned}, // before their own kind, "unavailable"
	{"reopened", ErrReopened},
	{"unavailable", errdefs.ErrUnavailable},
	{"not-implemented", errdefs.ErrNotImplemented},
	{"data-loss", errdefs.ErrDataLoss},
	{"permission-denied", errdefs.ErrPermissionDenied},
	{"resource-exhausted", errdefs.ErrResourceExhausted},
	{"aborted", errdefs.ErrAborted},
	{"internal", errdefs.ErrInternal},
	{"canceled", context.Canceled},
	{"deadline-exceeded", context.DeadlineExceeded},
}

func encodeError(err error) *wireError {
	w := &wireError{Kind: "unknown", Message: err.Error(), Corrupt: errdefs.AsCorrupt(err)}
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			w.Kind = k.name
			break
		}
	}
	return w
}

// remoteError is an error from the other side of a socket: its text, with the
// kind that it had there.
type remoteError struct {
	message string
	kind    error
}

func (e *remoteError) Error() string { return e.message }
func (e *remoteError) Unwrap() error { return e.kind }

func (w *wireError) decode() error {
	if w.Corrupt != nil {
		return &remoteError{w.Message, w.Corrupt}
	}
	for _, k := range kinds {
		if k.name == w.Kind {
			return &remoteError{w.Message, k.err}
		}
	}
	return &remoteError{w.Message, errdefs.ErrUnknown}
}

// maxRequest bounds the JSON line of a request; the bytes after it are not
// bounded here.
const maxRequest = 8 << 20

// readRequest reads the line of JSON that begins a call and returns the rest.
func readRequest(r io.Reader, req any) (io.Reader, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	var line []byte
	for {
		part, err := br.ReadSlice('\n')
		line = append(line, part...)
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return nil, fmt.Errorf("request ends before its first line does: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if len(line) > maxRequest {
			return nil, fmt.Errorf("request is longer than %d bytes: %w", maxRequest, errdefs.ErrInvalidArgument)
		}
	}
	if err := json.Unmarshal(line, req); err != nil {
		return nil, fmt.Errorf("request: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return br, nil
}
