package main

import (
	"sync/atomic"
	"time"
)

// watch looks until a file system is as free as it was.
type watch struct {
	took atomic.Int64
	end  chan struct{}
	done chan struct{}
}

// watchFree waits for at most so many inodes to be used. It looks ten times a
// second, apart from who makes containers, of which one may take minutes.
func watchFree(dir string, begin time.Time, most int64) *watch {
	w := &watch{end: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for usedInodes(dir) > most {
			select {
			case <-w.end:
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
		w.took.Store(int64(time.Since(begin)))
	}()
	return w
}

// seen is how long it took, or 0 as long as it does.
func (w *watch) seen() time.Duration { return time.Duration(w.took.Load()) }

func (w *watch) stop() {
	close(w.end)
	<-w.done
}
