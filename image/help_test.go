package image

import (
	"encoding/json"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"varve.dev/layout"
)

func readFile(t *testing.T, path string, v any) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatal(err)
	}
}

// flipIngest changes the first byte of what an ingest holds.
func flipIngest(t *testing.T, o *opened, d digest.Digest) {
	t.Helper()
	path := o.root.Path(filepath.Join(layout.IngestPath(layout.IngestFor(sharedRef(d))), layout.IngestData))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], 100); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], 100); err != nil {
		t.Fatal(err)
	}
}

// eventLog collects progress.
type eventLog struct {
	mu     sync.Mutex
	events []Event
}

func (l *eventLog) add(e Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, e)
}

func (l *eventLog) last(d digest.Digest) (last Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.events {
		if e.Blob == d {
			last = e
		}
	}
	return last
}

func testPathOf(o *opened, d digest.Digest) string {
	return o.root.Path(layout.BlobPath(layout.BlobDigest(d)))
}
