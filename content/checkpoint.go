package content

import (
	"path"
	"time"

	"varve.dev/layout"
)

// What a power cut costs a download is bounded by these, whichever comes
// first: so much is written, or so much time is past since the last
// checkpoint with writing in it. Most pulls are over before.
const (
	checkpointBytes = 256 << 20
	checkpointTime  = 30 * time.Second
)

// unsynced is what a store's ingests hold beyond their last checkpoint.
type unsynced struct {
	bytes int64
	since time.Time // of the first write after it
	busy  bool      // a checkpoint is being made
}

// wrote counts what was written to an ingest and makes a checkpoint of all of
// them if it is time.
func (s *Store) wrote(n int, now time.Time) error {
	files := s.due(int64(n), now)
	if files == nil {
		return nil
	}
	err := s.root.Checkpoint(files...)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy = false
	return err
}

// due returns the files of a checkpoint that is due; nil if none is.
func (s *Store) due(n int64, now time.Time) (files []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bytes += n; s.since.IsZero() {
		s.since = now
	}
	if s.busy || s.bytes < checkpointBytes && now.Sub(s.since) < checkpointTime {
		return nil
	}
	s.unsynced = unsynced{busy: true}
	for id := range s.open {
		dir := layout.IngestPath(id)
		files = append(files, path.Join(dir, layout.IngestInfo), path.Join(dir, layout.IngestData))
	}
	return files
}
