package content

import (
	"path"
	"time"

	"varve.dev/layout"
)

// What a power cut costs the downloads of a store is bounded: a checkpoint
// begins when so much was written since the last one, or so much time is past
// with writing in it, and while it is being made at most as much again is
// written. Most pulls are over before.
const (
	checkpointBytes = 128 << 20
	checkpointTime  = 30 * time.Second
)

// unsynced is what a store's ingests hold beyond their last checkpoint.
type unsynced struct {
	bytes int64
	since time.Time     // of the first write after it
	made  chan struct{} // closed when the checkpoint that is being made is made; nil if none is
}

// wrote counts what was written to an ingest and makes a checkpoint of all of
// them if it is time.
func (s *Store) wrote(n int, now time.Time) error {
	files, wait := s.due(int64(n), now)
	if wait != nil {
		<-wait
	}
	if files == nil {
		return nil
	}
	err := s.root.Checkpoint(files...)
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.made)
	s.made = nil
	return err
}

// due returns the files of a checkpoint that is to be made now, or a channel
// to wait for before more is written.
func (s *Store) due(n int64, now time.Time) (files []string, wait <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bytes += n; s.since.IsZero() {
		s.since = now
	}
	full := s.bytes >= checkpointBytes
	switch {
	case full && s.made != nil:
		return nil, s.made
	case !full && now.Sub(s.since) < checkpointTime || s.made != nil:
		return nil, nil
	}
	s.unsynced = unsynced{made: make(chan struct{})}
	for id := range s.open {
		dir := layout.IngestPath(id)
		files = append(files, path.Join(dir, layout.IngestInfo), path.Join(dir, layout.IngestData))
	}
	return files, nil
}
