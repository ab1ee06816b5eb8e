package contexttar

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// A server notices that its client is gone only when it has read all that the
// client sent, which is more than the archive.
func TestExtractReadsToTheEnd(t *testing.T) {
	var stream bytes.Buffer
	w := tar.NewWriter(&stream)
	if err := w.WriteHeader(&tar.Header{Name: "file", Size: 4, Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, "text"); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	stream.Write(make([]byte, 100<<10))
	dir := t.TempDir()
	if err := Extract(t.Context(), &stream, dir); err != nil {
		t.Fatal(err)
	}
	if stream.Len() > 0 {
		t.Errorf("%d bytes were not read", stream.Len())
	}
	if data, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(data) != "text" {
		t.Errorf("the file has %q, %v", data, err)
	}
}
