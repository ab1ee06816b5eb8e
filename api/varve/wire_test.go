package varve

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
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

// Load reads no more of an archive than its beginning.
func (s saver) Load(_ context.Context, archive io.Reader, _ func(Event)) ([]ImageSummary, error) {
	_, err := io.ReadFull(archive, make([]byte, 10))
	return nil, err
}

// serve answers on a socket for the length of the test. The server must have
// nothing to complain about.
func serve(t *testing.T, b Backend) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var complaints bytes.Buffer
	server := &http.Server{Handler: Handler(b), ErrorLog: log.New(&complaints, "", 0)}
	go func() { _ = server.Serve(l) }()
	c := NewClient(socket)
	t.Cleanup(func() {
		c.Close()
		if err := server.Shutdown(context.Background()); err != nil || complaints.Len() > 0 {
			t.Errorf("the server: %v\n%s", err, &complaints)
		}
	})
	return c
}

// A call that does not need all of what is sent leaves the server well.
func TestInputThatIsNotRead(t *testing.T) {
	c := serve(t, saver{})
	for _, size := range []int{20, 100 << 10, 10 << 20} {
		if _, err := c.Load(t.Context(), bytes.NewReader(make([]byte, size)), nil); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
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
