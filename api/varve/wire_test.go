package varve

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"varve.dev/errdefs"
)

// saver is a backend that saves what it has, in pieces.
type saver struct {
	Backend
	pieces []string
	err    error
}

func (s saver) Save(_ context.Context, _ SaveRequest, w io.Writer) error {
	for _, p := range s.pieces {
		if _, err := w.Write([]byte(p)); err != nil {
			return err
		}
	}
	return s.err
}

// serve answers on a socket for the length of the test.
func serve(t *testing.T, b Backend) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: Handler(b)}
	go func() { _ = server.Serve(l) }()
	c := NewClient(socket)
	t.Cleanup(func() { c.Close(); server.Close() })
	return c
}

// What comes through a socket is what was written, pieces of nothing included:
// a tar writer makes those.
func TestOutputThroughASocket(t *testing.T) {
	pieces := []string{"", "one", "", "", "two", strings.Repeat("x", 1<<20), ""}
	var out bytes.Buffer
	if err := serve(t, saver{pieces: pieces}).Save(t.Context(), SaveRequest{}, &out); err != nil {
		t.Fatal(err)
	}
	if want := strings.Join(pieces, ""); out.String() != want {
		t.Errorf("%d bytes came through of %d", out.Len(), len(want))
	}
	out.Reset()
	err := serve(t, saver{pieces: pieces, err: errdefs.ErrDataLoss}).Save(t.Context(), SaveRequest{}, &out)
	if !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("an error after the output: %v", err)
	}
}

// Only a result or an error ends an answer.
func TestAnswerThatDoesNotEnd(t *testing.T) {
	for _, text := range []string{"", "{}\n", `{"data":"eA=="}` + "\n", `{"data":"eA=="}` + "\n{}\n"} {
		if err := readAnswer(strings.NewReader(text), nil, io.Discard, nil); err == nil {
			t.Errorf("%q was taken for an answer", text)
		}
	}
	if err := readAnswer(strings.NewReader("{\"result\":null}\n"), nil, nil, nil); err != nil {
		t.Errorf("a result of nothing: %v", err)
	}
}
